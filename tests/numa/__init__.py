"""Where memory lies on machines of several NUMA nodes, page by page: `make numa-check`."""
