"""A lossy copy of a checkpoint, in few bits, as a compressed-tensors checkpoint (`hmc quantize`).

encode.py    a matrix -> the planes of a format, and what was lost
choice.py    which tensors are encoded, and why others are not
write.py     the copy, tensor by tensor, resumed where it ended
"""
