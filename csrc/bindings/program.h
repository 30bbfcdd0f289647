// The class Program of the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace imaml {

void define_program(pybind11::module_& m);

}  // namespace imaml
