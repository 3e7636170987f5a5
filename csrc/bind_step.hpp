#pragma once

#include <nanobind/nanobind.h>

namespace pando { void define_step(nanobind::module_& m); } // namespace pando
