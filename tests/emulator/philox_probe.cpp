// pybind11 module _philox: philox.cuh's functions, which run on one thread.
#include <pybind11/pybind11.h>

#include "cuda/philox.cuh"

PYBIND11_MODULE(_philox, m) {
    m.def("word", &igpt::cuda::philox_word);
    m.def("uniform", &igpt::cuda::philox_uniform);
}
