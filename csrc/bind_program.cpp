// The Python face of Program.
#include "bind_program.hpp"
#include "bind.hpp"
#include "isa.hpp"
#include "program.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace pando {

namespace {

// A program and the caches it was bound to.
struct BoundProgram {
    Program program;
    std::vector<LayerCache> caches;
    int64_t num_slots = 0;

    BoundProgram(int level, int dtype, int64_t width)
        : program(level_kernels(level), static_cast<DType>(dtype), width) {}

    using CacheTuple = std::tuple<Pointer, Pointer, int64_t, int64_t, int64_t, int64_t>;

    void bind(const std::vector<CacheTuple>& layers, int64_t slots) {
        caches.clear();
        for (const auto& [k, v, k_slot, k_head, v_slot, v_head] : layers) {
            caches.push_back({at<char>(k), at<char>(v), k_slot, k_head, v_slot, v_head});
        }
        num_slots = slots;
    }

    void heads(int qkv, int layer, int rotary, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t v_dim,
               int64_t rotary_dim, Pointer q_norm, Pointer k_norm, float eps, bool norm_after_rope, bool interleaved) {
        program.heads(qkv, {layer, rotary, q_heads, kv_heads, head_dim, v_dim, rotary_dim, at<const float>(q_norm),
                            at<const float>(k_norm), eps, norm_after_rope, interleaved});
    }

    void attend(int qkv, int out, int layer, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t v_dim,
                int64_t window, float scale, float softcap, Pointer sinks) {
        program.attend(qkv, out,
                       {layer, q_heads, kv_heads, head_dim, v_dim, window, scale, softcap, at<const float>(sinks)});
    }

    void run(Pointer residual, Pointer result, int64_t tokens, int64_t rows, Pointer positions, Pointer out_loc,
             Pointer cu_q_lens, Pointer kv_lens, Pointer page_table, int64_t table_stride, int64_t table_width,
             int64_t page_size, const std::vector<std::pair<Pointer, int64_t>>& rotaries) {
        std::vector<RotaryTable> tables;
        for (const auto& [table, positions_held] : rotaries) tables.push_back({at<const float>(table), positions_held});
        const nb::gil_scoped_release unlocked;
        program.run({tokens, rows, at<char>(residual), at<char>(result), at<const int64_t>(positions),
                     at<const int64_t>(out_loc), at<const int32_t>(cu_q_lens), at<const int32_t>(kv_lens),
                     at<const int32_t>(page_table), table_stride, table_width, page_size, num_slots, caches.data(),
                     tables.data()});
    }
};

} // namespace

void define_program(nb::module_& m) {
    nb::class_<BoundProgram>(m, "Program")
        .def(nb::init<int, int, int64_t>())
        .def("bind", &BoundProgram::bind)
        .def("buffer", [](BoundProgram& self, int64_t width) { return self.program.buffer(width); })
        .def("norm", [](BoundProgram& self, int in, int out, Pointer weight,
                        float eps) { self.program.norm(in, out, at<const float>(weight), eps); })
        .def("linear", [](BoundProgram& self, int in, int out, const PackedWeight& weight,
                          bool accumulate) { self.program.linear(in, out, &weight, accumulate); })
        .def("add", [](BoundProgram& self, int in, int out) { self.program.add(in, out); })
        .def("scale", [](BoundProgram& self, int buffer, float factor) { self.program.scale(buffer, factor); })
        .def("heads", &BoundProgram::heads)
        .def("attend", &BoundProgram::attend)
        .def("run", &BoundProgram::run);
}

} // namespace pando
