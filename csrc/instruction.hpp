// What the instructions of a program see of a step.
#pragma once

#include "program.hpp"

namespace pando {

inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Where everything lies in this step.
struct Frame {
    const Kernels& kernels;
    const StepArgs& step;
    DType dtype;
    const int64_t* widths;
    char* const* data;
    AttentionPlan& plan;

    // Column `offset` of a buffer's first row.
    char* at(int buffer, int64_t offset) const { return data[buffer] + offset * element_bytes(dtype); }
};

struct Instruction {
    virtual ~Instruction() = default;
    virtual void run(const Frame& frame) const = 0;
};

} // namespace pando
