"""Our int8 kernels for x86 CPUs: regions of a converted graph as plans, packed weights, the library in C++."""
