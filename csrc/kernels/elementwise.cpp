// Norms, rotary embedding and gated activations: float32 arithmetic between one load and one rounding store.
#include "activations.hpp"
#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

template <class T>
float square_sum(const T* x, int64_t n) {
    vf total{};
    for_row(
        n,
        [&](int64_t i) {
            const vf v = load(x + i);
            total += v * v;
        },
        [&](int64_t i, int64_t rest) {
            const vf v = load_first(x + i, rest);
            total += v * v;
        });
    return sum(total);
}

template <class T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
    const int64_t n = args.size;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row / args.x.inner * args.x.outer_stride + row % args.x.inner * args.x.inner_stride;
        const T* x = reinterpret_cast<const T*>(args.x.data) + at;
        if (args.residual != nullptr) {
            T* residual = reinterpret_cast<T*>(args.residual) + row * n;
            for_row(
                n, [&](int64_t i) { store(residual + i, load(residual + i) + load(x + i)); },
                [&](int64_t i, int64_t rest) {
                    store_first(residual + i, load_first(residual + i, rest) + load_first(x + i, rest), rest);
                });
            x = residual;
        }
        const float scale = 1.0f / sqrtf(square_sum(x, n) / static_cast<float>(n) + args.eps);
        T* out = reinterpret_cast<T*>(args.out) + row * n;
        for_row(
            n, [&](int64_t i) { store(out + i, load(x + i) * scale * load(args.weight + i)); },
            [&](int64_t i, int64_t rest) {
                store_first(out + i, load_first(x + i, rest) * scale * load_first(args.weight + i, rest), rest);
            });
    }
}

template <class T>
void rotate_halves(T* x, const float* cos, const float* sin, int64_t half) {
    T* first = x;
    T* second = x + half;
    for_row(
        half,
        [&](int64_t i) {
            const vf a = load(first + i), b = load(second + i), c = load(cos + i), s = load(sin + i);
            store(first + i, a * c - b * s);
            store(second + i, b * c + a * s);
        },
        [&](int64_t i, int64_t rest) {
            const vf a = load_first(first + i, rest), b = load_first(second + i, rest);
            const vf c = load_first(cos + i, rest), s = load_first(sin + i, rest);
            store_first(first + i, a * c - b * s, rest);
            store_first(second + i, b * c + a * s, rest);
        });
}

template <class T>
void rotate_pairs(T* x, const float* cos, const float* sin, int64_t half) {
    T first[W], second[W];
    memset(first, 0, sizeof first);
    memset(second, 0, sizeof second);
    for (int64_t i = 0; i < half; i += W) {
        const int64_t count = smaller(W, half - i);
        T* pairs = x + 2 * i;
        for (int64_t lane = 0; lane < count; ++lane) {
            first[lane] = pairs[2 * lane];
            second[lane] = pairs[2 * lane + 1];
        }
        const vf a = load(first), b = load(second), c = load_first(cos + i, count), s = load_first(sin + i, count);
        store(first, a * c - b * s);
        store(second, b * c + a * s);
        for (int64_t lane = 0; lane < count; ++lane) {
            pairs[2 * lane] = first[lane];
            pairs[2 * lane + 1] = second[lane];
        }
    }
}

template <class T>
bool rope_tokens(const RopeArgs& args, int64_t begin, int64_t end) {
    const int64_t half = args.rotary_dim / 2;
    bool valid = true;
    const auto rotate = args.interleaved ? rotate_pairs<T> : rotate_halves<T>;
    for (int64_t token = begin; token < end; ++token) {
        const int64_t position = args.positions[token];
        if (position < 0 || position >= args.max_position) {
            valid = false;
            continue;
        }
        const float* cos = args.cos_sin + position * args.rotary_dim;
        T* q = reinterpret_cast<T*>(args.q) + token * args.q_token_stride;
        T* k = reinterpret_cast<T*>(args.k) + token * args.k_token_stride;
        for (int64_t head = 0; head < args.q_heads; ++head)
            rotate(q + head * args.q_head_stride, cos, cos + half, half);
        for (int64_t head = 0; head < args.k_heads; ++head)
            rotate(k + head * args.k_head_stride, cos, cos + half, half);
    }
    return valid;
}

template <class T>
void norm_head(T* x, const float* weight, int64_t n, float eps) {
    const float scale = 1.0f / sqrtf(square_sum(x, n) / static_cast<float>(n) + eps);
    for_row(
        n, [&](int64_t i) { store(x + i, load(x + i) * scale * load(weight + i)); },
        [&](int64_t i, int64_t rest) {
            store_first(x + i, load_first(x + i, rest) * scale * load_first(weight + i, rest), rest);
        });
}

// Norm and rotation of `count` neighbouring heads, in the order the family wants; cos null: no rotation.
template <class T>
void turn_heads(const HeadsArgs& args, T* x, int64_t count, const float* weight, const float* cos) {
    const int64_t half = args.rotary_dim / 2;
    const auto rotate = args.interleaved ? rotate_pairs<T> : rotate_halves<T>;
    for (int64_t head = 0; head < count; ++head, x += args.head_dim) {
        if (weight != nullptr && !args.norm_after_rope) norm_head(x, weight, args.head_dim, args.eps);
        if (cos != nullptr) rotate(x, cos, cos + half, half);
        if (weight != nullptr && args.norm_after_rope) norm_head(x, weight, args.head_dim, args.eps);
    }
}

template <class T>
void put_row(const HeadsArgs& args, char* to, const T* from, int64_t dim) {
    if (args.int8_kv) {
        round_kv(args.dtype, reinterpret_cast<const char*>(from), dim, to);
    } else {
        memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
    }
}

template <class T>
bool heads_tokens(const HeadsArgs& args, int64_t begin, int64_t end) {
    bool valid = true;
    for (int64_t token = begin; token < end; ++token) {
        const int64_t position = args.positions[token], slot = args.out_loc[token];
        if (args.cos_sin != nullptr && (position < 0 || position >= args.max_position)) {
            valid = false;
            continue;
        }
        const float* cos = args.cos_sin == nullptr ? nullptr : args.cos_sin + position * args.rotary_dim;
        T* q = reinterpret_cast<T*>(args.qkv) + token * args.token_stride;
        T* k = q + args.q_heads * args.head_dim;
        const T* v = k + args.kv_heads * args.head_dim;
        turn_heads(args, q, args.q_heads, args.q_norm, cos);
        turn_heads(args, k, args.kv_heads, args.k_norm, cos);
        const int64_t width = args.int8_kv ? 1 : int64_t{sizeof(T)};
        char* k_cache = args.k_cache + slot * args.k_slot_stride * width;
        char* v_cache = args.v_cache + slot * args.v_slot_stride * width;
        for (int64_t head = 0; head < args.kv_heads; ++head) {
            put_row(args, k_cache + head * args.k_slot_head_stride * width, k + head * args.head_dim, args.head_dim);
            put_row(args, v_cache + head * args.v_slot_head_stride * width, v + head * args.v_dim, args.v_dim);
        }
    }
    return valid;
}

template <class T>
void blend_rows(const BlendArgs& args, int64_t begin, int64_t end) {
    T* out = reinterpret_cast<T*>(args.out) + begin * args.size;
    const int64_t n = (end - begin) * args.size;
    if (args.in == nullptr) {
        for_row(
            n, [&](int64_t i) { store(out + i, load(out + i) * args.factor); },
            [&](int64_t i, int64_t rest) { store_first(out + i, load_first(out + i, rest) * args.factor, rest); });
        return;
    }
    const T* in = reinterpret_cast<const T*>(args.in) + begin * args.size;
    for_row(
        n, [&](int64_t i) { store(out + i, load(out + i) + load(in + i)); },
        [&](int64_t i, int64_t rest) {
            store_first(out + i, load_first(out + i, rest) + load_first(in + i, rest), rest);
        });
}

template <class T, class Kind>
void activate_rows(const ActivationArgs& args, int64_t begin, int64_t end) {
    const int64_t n = args.size;
    for (int64_t row = begin; row < end; ++row) {
        const T* gate = reinterpret_cast<const T*>(args.gate_up) + row * args.row_stride;
        const T* up = gate + n;
        T* out = reinterpret_cast<T*>(args.out) + row * n;
        for_row(
            n, [&](int64_t i) { store(out + i, Kind::of(load(gate + i), load(up + i))); },
            [&](int64_t i, int64_t rest) {
                store_first(out + i, Kind::of(load_first(gate + i, rest), load_first(up + i, rest)), rest);
            });
    }
}

template <class T>
void activate(const ActivationArgs& args, int64_t begin, int64_t end) {
    switch (args.kind) {
    case Activation::silu: return activate_rows<T, Silu>(args, begin, end);
    case Activation::gelu_tanh: return activate_rows<T, GeluTanh>(args, begin, end);
    case Activation::gelu: return activate_rows<T, Gelu>(args, begin, end);
    case Activation::relu2: return activate_rows<T, Relu2>(args, begin, end);
    case Activation::swiglu_oai: return activate_rows<T, SwigluOai>(args, begin, end);
    }
}

} // namespace

void norm(const NormArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return norm_rows<float>(args, begin, end);
    case DType::bf16: return norm_rows<bf16>(args, begin, end);
    case DType::f16: return norm_rows<f16>(args, begin, end);
    }
}

bool rope(const RopeArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return rope_tokens<float>(args, begin, end);
    case DType::bf16: return rope_tokens<bf16>(args, begin, end);
    case DType::f16: return rope_tokens<f16>(args, begin, end);
    }
    return false;
}

bool heads(const HeadsArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return heads_tokens<float>(args, begin, end);
    case DType::bf16: return heads_tokens<bf16>(args, begin, end);
    case DType::f16: return heads_tokens<f16>(args, begin, end);
    }
    return false;
}

void blend(const BlendArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return blend_rows<float>(args, begin, end);
    case DType::bf16: return blend_rows<bf16>(args, begin, end);
    case DType::f16: return blend_rows<f16>(args, begin, end);
    }
}

void activation(const ActivationArgs& args, int64_t begin, int64_t end) {
    switch (args.dtype) {
    case DType::f32: return activate<float>(args, begin, end);
    case DType::bf16: return activate<bf16>(args, begin, end);
    case DType::f16: return activate<f16>(args, begin, end);
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
