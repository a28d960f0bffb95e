"""Kernels of GPUs in Triton: matrix products over stored weights, attention, rows, routing. Nothing
here knows models, plans or torch, and Triton is loaded only where a kernel is asked for.

layout.py      what of a format's row is compiled into kernels
planes.py      device functions: a tile of a stored matrix from its planes, and its rows' scales
sums.py        device functions: sums over columns, and parts of sums joined in a fixed order
linear.py      kernels: y = x W^T, and the activation of two such products
experts.py     kernels: the same for the experts of a step, all in one launch
terms.py       kernel: x as the sum of two FP8 numbers
activation.py  an activation's expression as the source of a device function
build.py       kernels made of all this for one layout, by any compiler
table.py       every kernel by name: arguments, tiles by architecture, compilation ahead of time
attend.py      kernel: attention of decode; attend_prompt.py of prompts; attend_tiles.py their tiles
latent.py      kernels: latent attention's products with kv_b
rows.py        kernels: norms, sums, rotary embedding, new rows of caches
route.py       kernel: experts of every token; sort.py: tokens in the order of their experts
library.py     kernels that read no stored matrix, and those of latent.py for one layout

In the names of sizes, a matrix [rows, columns] is a stored weight, and `tokens` are rows of x.
Kernels compute transposed tiles [rows, tokens]: the weight is the left operand of a product, which
tensor cores take from registers, where codes are decoded.
"""
