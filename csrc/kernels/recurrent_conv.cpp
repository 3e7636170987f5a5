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

#if defined(__AVX512BW__) && PANDO_VECTOR_BYTES == 64
// The same for sixteen channels of the usual sizes, by permutations: element by element they cost several times the
// convolution of one token. The numbers of lanes are those of two registers side by side.

// Lane i: start + i * step, of the 16-bit or 32-bit elements of a pair of registers.
inline __m512i lanes16(int start, int step) {
    uint16_t lanes[32];
    for (int i = 0; i < 32; ++i) lanes[i] = static_cast<uint16_t>(start + i * step);
    return _mm512_loadu_si512(lanes);
}
inline __m512i lanes32(int start, int step) {
    uint32_t lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = static_cast<uint32_t>(start + i * step);
    return _mm512_loadu_si512(lanes);
}

void load_4_of_16(const float* x, vf* out) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const __m512 c = _mm512_loadu_ps(x + 32), d = _mm512_loadu_ps(x + 48);
    for (int j = 0; j < 4; ++j) {
        const __m512i from = lanes32(j, 4); // lanes 8 to 15 are not used
        const __m512 low = _mm512_permutex2var_ps(a, from, b), high = _mm512_permutex2var_ps(c, from, d);
        out[j] = _mm512_insertf32x8(low, _mm512_castps512_ps256(high), 1);
    }
}

// T is 16 bits wide.
template <class T>
void load_3_of_16(const T* x, vf* out) {
    const __m512i a = _mm512_loadu_si512(x);
    const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 32)));
    for (int j = 0; j < 3; ++j) {
        T lanes[W];
        const __m512i column = _mm512_permutex2var_epi16(a, lanes16(j, 3), b);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm512_castsi512_si256(column));
        out[j] = load(lanes);
    }
}

template <class T>
void store_3_of_16(T* x, const vf* from) {
    T columns[4 * W];
    for (int j = 0; j < 3; ++j) store(columns + j * W, from[j]);
    const __m512i a = _mm512_loadu_si512(columns);
    const __m512i b = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns + 2 * W)));
    uint16_t order[3 * W]; // element i * 3 + j is lane i of column j
    for (int i = 0; i < 3 * W; ++i) order[i] = static_cast<uint16_t>(i % 3 * W + i / 3);
    const __m512i first = _mm512_loadu_si512(order);
    const __m512i rest = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(order + 32)));
    _mm512_storeu_si512(x, _mm512_permutex2var_epi16(a, first, b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + 32),
                        _mm512_castsi512_si256(_mm512_permutex2var_epi16(a, rest, b)));
}

template <int TAPS, class T>
void load_window(const T* x, int64_t n, int64_t columns, vf* out) {
    if constexpr (TAPS == 4 && sizeof(T) == 2) {
        if (n == W) return load_3_of_16(x, out);
    }
    load_columns(x, n, columns, out);
}

template <int TAPS, class T>
void store_window(T* x, int64_t n, int64_t columns, const vf* from) {
    if constexpr (TAPS == 4 && sizeof(T) == 2) {
        if (n == W) return store_3_of_16(x, from);
    }
    store_columns(x, n, columns, from);
}

template <int TAPS>
void load_weight(const float* x, int64_t n, int64_t columns, vf* out) {
    if constexpr (TAPS == 4) {
        if (n == W) return load_4_of_16(x, out);
    }
    load_columns(x, n, columns, out);
}
#else
template <int TAPS, class T>
void load_window(const T* x, int64_t n, int64_t columns, vf* out) {
    load_columns(x, n, columns, out);
}
template <int TAPS, class T>
void store_window(T* x, int64_t n, int64_t columns, const vf* from) {
    store_columns(x, n, columns, from);
}
template <int TAPS>
void load_weight(const float* x, int64_t n, int64_t columns, vf* out) {
    load_columns(x, n, columns, out);
}
#endif

// n <= W channels of a row. TAPS 0: any number.
template <int TAPS, class T>
void run_channels(const ConvArgs& args, const RecurrentTask& task, int64_t channel, int64_t n) {
    const int64_t taps = TAPS > 0 ? TAPS : args.taps, kept = taps - 1;
    const auto state_of = [&](int64_t slot) {
        return reinterpret_cast<T*>(args.state) + slot * args.slot_stride + channel * kept;
    };
    vf weight[TAPS > 0 ? TAPS : MAX_TAPS], window[TAPS > 0 ? TAPS : MAX_TAPS], bias{};
    for (vf& past : window) past = vf{};
    load_weight<TAPS>(args.weight + channel * taps, n, taps, weight);
    if (args.bias != nullptr) bias = load_part(args.bias + channel, n);
    if (!task.fresh) load_window<TAPS>(state_of(task.slot), n, kept, window);
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
        [&](int64_t slot) { store_window<TAPS>(state_of(slot), n, kept, window); });
    store_window<TAPS>(state_of(task.slot), n, kept, window);
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
