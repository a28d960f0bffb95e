"""What codes of 4 bits are worth in GGUF's formats that have a table for it."""

from __future__ import annotations

E2M1_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0,
                0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # fmt: skip
"""MXFP4: the table is doubled, and powers are halved."""
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0,
       1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)  # fmt: skip
"""IQ4_NL and IQ4_XS."""
