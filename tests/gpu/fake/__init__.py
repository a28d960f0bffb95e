"""hmc's CUDA path without a GPU: `make gpu-fake`.

A real CUDA build of PyTorch runs on libraries that play the CUDA runtime, the driver, cuBLAS and
cuBLASLt (`c/`): memory of GPUs is the host's, copies are done, kernels do nothing, and every call
is logged and checked. Checks in processes of their own say whether statements about it hold; one
table comes last.

Real      PyTorch's dispatcher, argument checks, allocators, graphs and stream sanitizer, NVRTC;
          Triton with its compiler and launcher; hmc with its threads, plans and native programs.
Played    which memory is whose, what captures forbid, the GPU of streams and events, limits of
          launches, the size of memory.
Read      what cuBLASLt refuses (`c/lt.c`): from documents, not measured.
Missing   what kernels compute: memory keeps what it had. Time. Work of streams side by side: it is
          done in the order of handing over, so the sanitizer and the log find what is not ordered.
          cuDNN, NCCL, memory of other processes.

What control flow reads of values (experts chosen, where they begin) is written by `hooks.py`. The
sanitizer sees what goes through PyTorch's dispatcher; it is told of Triton's launches by
`launches.py`.
"""
