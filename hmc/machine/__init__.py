"""A machine as data, and this one as /proc and /sys describe it.

model.py     the records: cores, nodes, GPUs, rates
detect.py    this machine, or one of a file, and the saved rates
checkup.py   what makes it slower than it has to be
topology.py  cores, siblings and NUMA nodes of the process's CPUs
"""
