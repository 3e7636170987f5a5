#pragma once

#include <nanobind/nanobind.h>

namespace pando {

// Adds the recurrent ops to the module.
void define_recurrent(nanobind::module_& m);

} // namespace pando
