"""DeepGEMM kernels: a package is found, checked and tried once before anything relies on it."""
