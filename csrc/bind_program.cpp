// The Python face of Program.
#include "bind_program.hpp"
#include "bind.hpp"
#include "experts.hpp"
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
    std::vector<RotaryTable> tables;
    std::vector<PageTable> groups;
    std::vector<LayerState> states;
    StepArgs step{};

    BoundProgram(int level, int dtype, int64_t width)
        : program(level_kernels(level), static_cast<DType>(dtype), width) {}

    using CacheTuple = std::tuple<Pointer, Pointer, int64_t, int64_t, int64_t, int64_t, int64_t, int, bool>;
    using GroupTuple = std::tuple<Pointer, Pointer, int64_t, int64_t>; // out_loc; page table: address, stride, width

    void bind(const std::vector<CacheTuple>& layers) {
        caches.clear();
        for (const auto& [k, v, k_slot, k_head, v_slot, v_head, slots, group, int8_kv] : layers) {
            caches.push_back({at<char>(k), at<char>(v), k_slot, k_head, v_slot, v_head, slots, group, int8_kv});
        }
    }

    // (address, slot stride, slots) of every state tensor of every layer.
    void bind_states(const std::vector<std::tuple<Pointer, int64_t, int64_t>>& tensors) {
        states.clear();
        for (const auto& [data, stride, slots] : tensors) states.push_back({at<char>(data), stride, slots});
    }

    // The states of the steps to come.
    void look_at_states(Pointer slots, Pointer fresh, Pointer save_token, Pointer save_slot, int64_t num_saves) {
        step.state_rows = {at<const int64_t>(slots), at<const uint8_t>(fresh), at<const int64_t>(save_token),
                           at<const int64_t>(save_slot), num_saves};
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

    // The ragged arguments of the steps to come; the tensors' memory may change from step to step.
    void look_at(int64_t tokens, int64_t rows, Pointer positions, Pointer cu_q_lens, Pointer kv_lens,
                 const std::vector<GroupTuple>& page_tables, int64_t page_size,
                 const std::vector<std::pair<Pointer, int64_t>>& rotaries) {
        groups.clear();
        for (const auto& [out_loc, pages, stride, width] : page_tables) {
            groups.push_back({at<const int64_t>(out_loc), at<const int32_t>(pages), stride, width});
        }
        tables.clear();
        for (const auto& [table, positions_held] : rotaries) tables.push_back({at<const float>(table), positions_held});
        step.num_tokens = tokens;
        step.num_rows = rows;
        step.positions = at<const int64_t>(positions);
        step.cu_q_lens = at<const int32_t>(cu_q_lens);
        step.kv_lens = at<const int32_t>(kv_lens);
        step.groups = groups.data();
        step.page_size = page_size;
        step.rotaries = tables.data();
    }

    // residual: 0 where the program embeds input_ids, which are 0 otherwise.
    void run(Pointer residual, Pointer input_ids, Pointer result) {
        step.residual = at<char>(residual);
        step.input_ids = at<const int64_t>(input_ids);
        step.result = at<char>(result);
        for (const LayerCache& cache : caches) {
            if (cache.group < 0 || static_cast<size_t>(cache.group) >= groups.size()) {
                throw std::invalid_argument("a layer's group has no page table");
            }
        }
        step.caches = caches.data();
        step.states = states.data();
        const nb::gil_scoped_release unlocked;
        program.run(step);
    }
};

} // namespace

void define_program(nb::module_& m) {
    nb::class_<BoundProgram>(m, "Program")
        .def(nb::init<int, int, int64_t>())
        .def("bind", &BoundProgram::bind)
        .def("buffer", [](BoundProgram& self, int64_t width) { return self.program.buffer(width); })
        .def("embed",
             [](BoundProgram& self, Pointer rows, int64_t vocab) { self.program.embed(at<const char>(rows), vocab); })
        .def("norm", [](BoundProgram& self, int in, int out, Pointer weight,
                        float eps) { self.program.norm(in, out, at<const float>(weight), eps); })
        .def("linear", [](BoundProgram& self, int in, int out, const PackedWeight& weight,
                          bool accumulate) { self.program.linear(in, out, &weight, accumulate); })
        .def("add", [](BoundProgram& self, int in, int out) { self.program.add(in, out); })
        .def("scale", [](BoundProgram& self, int buffer, float factor) { self.program.scale(buffer, factor); })
        .def("heads", &BoundProgram::heads)
        .def("attend", &BoundProgram::attend)
        .def("normalize",
             [](BoundProgram& self, int in, int64_t in_offset, int out, int64_t out_offset, int64_t groups,
                int64_t size, Pointer weight, Pointer bias, int64_t weight_stride, float eps, bool centered) {
                 self.program.normalize(
                     in, in_offset, out, out_offset,
                     {groups, size, at<const float>(weight), at<const float>(bias), weight_stride, eps, centered});
             })
        .def("modulate",
             [](BoundProgram& self, int in, int64_t offset, int out, int kind, bool broadcast) {
                 self.program.modulate(in, offset, out, static_cast<Modulation>(kind), broadcast);
             })
        .def("mixture",
             [](BoundProgram& self, int in, int logits, int out, const PackedExperts& experts, int64_t num_experts,
                int64_t top_k, int score, Pointer correction, int64_t groups, int64_t top_groups, int64_t group_scores,
                bool renormalise, float scale) {
                 self.program.mixture(in, logits, out,
                                      {num_experts, top_k, static_cast<Score>(score), at<const float>(correction),
                                       groups, top_groups, group_scores, renormalise, scale},
                                      &experts);
             })
        .def("gated_norm",
             [](BoundProgram& self, int y, int z, int64_t offset, int64_t size, Pointer weight, int64_t weight_stride,
                float eps, bool gate_first) {
                 self.program.gated_norm(y, z, offset, {size, at<const float>(weight), weight_stride, eps, gate_first});
             })
        .def("conv",
             [](BoundProgram& self, int in, int64_t offset, int out, int state, int64_t taps, Pointer weight,
                Pointer bias, bool silu) {
                 self.program.conv(in, offset, out,
                                   {state, taps, at<const float>(weight), at<const float>(bias), silu});
             })
        .def("delta",
             [](BoundProgram& self, int qkv, int gates, int out, int state, int64_t key_heads, int64_t value_heads,
                int64_t key_dim, int64_t value_dim, Pointer rate, Pointer dt_bias, float scale) {
                 self.program.delta(qkv, gates, out,
                                    {state, key_heads, value_heads, key_dim, value_dim, at<const float>(rate),
                                     at<const float>(dt_bias), scale});
             })
        .def("space",
             [](BoundProgram& self, int xbc, int projected, int out, int state, int64_t heads, int64_t groups,
                int64_t head_dim, int64_t state_size, int64_t dt_offset, Pointer a, Pointer d, Pointer dt_bias,
                float low, float high) {
                 self.program.space(xbc, projected, out,
                                    {state, heads, groups, head_dim, state_size, dt_offset, at<const float>(a),
                                     at<const float>(d), at<const float>(dt_bias), low, high});
             })
        .def("bind_states", &BoundProgram::bind_states)
        .def("look_at_states", &BoundProgram::look_at_states)
        .def("look_at", &BoundProgram::look_at)
        .def("run", &BoundProgram::run);
}

} // namespace pando
