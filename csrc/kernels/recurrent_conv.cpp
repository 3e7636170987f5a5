// Causal convolution over the tokens of a row, channel by channel. Lanes are channels: the last inputs move through
// registers, and a state is read and written once.
#include "leaves.hpp"
#include "recurrent_rows.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

// A matrix [n][columns] as `columns` vectors of its first n <= W rows; the other lanes are 0.
template <class T>
void load_columns(const T* x, int64_t n, int64_t columns, vf* out) {
    for (int64_t j = 0; j < columns; ++j) {
        T lanes[W];
        memset(lanes, 0, sizeof lanes);
        for (int64_t i = 0; i < n; ++i) lanes[i] = x[i * columns + j];
        out[j] = load(lanes);
    }
}

template <class T>
void store_columns(T* x, int64_t n, int64_t columns, const vf* from) {
    for (int64_t j = 0; j < columns; ++j) {
        T lanes[W];
        store(lanes, from[j]);
        for (int64_t i = 0; i < n; ++i) x[i * columns + j] = lanes[i];
    }
}

// n <= W channels of a row. TAPS 0: any number.
template <int TAPS, class T>
void run_channels(const ConvArgs& args, const RecurrentTask& task, int64_t channel, int64_t n) {
    const int64_t taps = TAPS > 0 ? TAPS : args.taps, kept = taps - 1;
    const auto state_of = [&](int64_t slot) {
        return reinterpret_cast<T*>(args.state) + slot * args.slot_stride + channel * kept;
    };
    vf weight[TAPS > 0 ? TAPS : MAX_TAPS], window[TAPS > 0 ? TAPS : MAX_TAPS], bias{};
    for (vf& past : window) past = vf{};
    load_columns(args.weight + channel * taps, n, taps, weight);
    if (args.bias != nullptr) bias = load_part(args.bias + channel, n);
    if (!task.fresh) load_columns(state_of(task.slot), n, kept, window);
    const T* x = reinterpret_cast<const T*>(args.x) + channel;
    T* out = reinterpret_cast<T*>(args.out) + channel;
    for_chunks(
        task, task.token_end - task.token_begin,
        [&](int64_t first, int64_t last) {
            for (int64_t token = first; token < last; ++token) {
                const T* const newest = x + token * args.token_stride;
                window[kept] = n == W ? load(newest) : load_first(newest, n);
                vf y = bias;
                for (int64_t j = 0; j < taps; ++j) y = fused(weight[j], window[j], y);
                for (int64_t j = 0; j < kept; ++j) window[j] = window[j + 1];
                if (args.silu) y = y * vsigmoid(y);
                if (n == W) {
                    store(out + token * args.channels, y);
                } else {
                    store_first(out + token * args.channels, y, n);
                }
            }
        },
        [&](int64_t slot) { store_columns(state_of(slot), n, kept, window); });
    store_columns(state_of(task.slot), n, kept, window);
}

template <class T>
void run_task(T*, const ConvArgs& args, const RecurrentTask& task) {
    const auto run = args.taps == 4   ? run_channels<4, T>
                     : args.taps == 3 ? run_channels<3, T>
                     : args.taps == 2 ? run_channels<2, T>
                                      : run_channels<0, T>;
    for (int64_t channel = task.unit_begin; channel < task.unit_end; channel += W) {
        run(args, task, channel, smaller(W, task.unit_end - channel));
    }
}

} // namespace

void conv(const ConvArgs& args, const RecurrentTask& task) {
    with_type(args.dtype, [&](auto* type) { run_task(type, args, task); });
}

} // namespace PANDO_LEVEL
} // namespace pando
