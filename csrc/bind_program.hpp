#pragma once

#include <nanobind/nanobind.h>

namespace pando {

// Adds the class Program to the module.
void define_program(nanobind::module_& m);

} // namespace pando
