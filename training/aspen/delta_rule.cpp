// The gated delta rule, step by step, and the short convolution before it, forward and backward, for one core.
//
// Per sequence and value head, with the state S [K, V] in fp32:
//     P = a_t S,  w_t = v_t - P^T k_t,  u_t = beta_t w_t,  S = P + k_t u_t^T,  o_t = S^T q_t
// Layouts: q, k [B, T, HK, K]; v, o [B, T, HV, V]; a, beta [B, T, HV]; starts [B, T] (non-zero: the state is empty
// before this token); checkpoints [B, HV, ceil(T / SEGMENT), K, V], the state before each segment. K and V are
// multiples of 16; value head h reads key head h / (HV / HK).

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using lanes = float __attribute__((vector_size(64)));
using index_lanes = int __attribute__((vector_size(64)));
constexpr int LANES = 16;
constexpr int64_t SEGMENT = 32;  // 32 states of 64 x 48 are 384 KB: the backward pass's history stays in the L2 cache

struct Sizes {
  int64_t batch, length, key_heads, value_heads, key_dim;
};

lanes load(const float* from) {
  lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

void store(float* to, lanes x) { std::memcpy(to, &x, sizeof x); }

lanes fold(lanes a, lanes b, index_lanes low, int distance) {
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + distance);
}

// Lane r of the result is the sum of the lanes of rows[r]; rows is used up.
lanes row_sums(lanes* rows) {
  constexpr index_lanes EIGHT = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr index_lanes FOUR = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  constexpr index_lanes TWO = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr index_lanes ONE = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  for (int j = 0; j < 8; ++j) rows[j] = fold(rows[j], rows[j + 8], EIGHT, 8);
  for (int j = 0; j < 4; ++j) rows[j] = fold(rows[j], rows[j + 4], FOUR, 4);
  for (int j = 0; j < 2; ++j) rows[j] = fold(rows[j], rows[j + 2], TWO, 2);
  return fold(rows[0], rows[1], ONE, 1);
}

float sum(lanes x) {
  float total = 0;
  for (int j = 0; j < LANES; ++j) total += x[j];
  return total;
}

// w_t into `error`, from the state before the step. Two chains of sums hide the latency of the multiply-add.
template <int N>
void read_error(const lanes* state, const float* k, const float* v, float a, int64_t key_dim, lanes* error) {
  lanes even[N] = {}, odd[N] = {};
  for (int64_t i = 0; i < key_dim; i += 2)
    for (int n = 0; n < N; ++n) {
      even[n] += state[i * N + n] * k[i];
      odd[n] += state[(i + 1) * N + n] * k[i + 1];
    }
  for (int n = 0; n < N; ++n) error[n] = load(v + n * LANES) - (even[n] + odd[n]) * a;
}

template <int N>
void forward_head(const Sizes& z, int64_t b, int64_t head, const float* q, const float* k, const float* v,
                  const float* a, const float* beta, const uint8_t* starts, float* o, float* checkpoints) {
  const int64_t key_dim = z.key_dim, key_head = head / (z.value_heads / z.key_heads), cells = key_dim * N;
  const int64_t num_segments = (z.length + SEGMENT - 1) / SEGMENT;
  std::vector<lanes> state(cells);
  for (int64_t t = 0; t < z.length; ++t) {
    const int64_t token = b * z.length + t, value = token * z.value_heads + head;
    const float* key = k + (token * z.key_heads + key_head) * key_dim;
    const float* query = q + (token * z.key_heads + key_head) * key_dim;
    if (t % SEGMENT == 0)
      std::memcpy(checkpoints + ((b * z.value_heads + head) * num_segments + t / SEGMENT) * cells * LANES,
                  state.data(), cells * sizeof(lanes));
    if (starts[token]) std::memset(state.data(), 0, cells * sizeof(lanes));
    lanes update[N], even[N] = {}, odd[N] = {};
    read_error<N>(state.data(), key, v + value * N * LANES, a[value], key_dim, update);
    for (int n = 0; n < N; ++n) update[n] *= beta[value];
    for (int64_t i = 0; i < key_dim; i += 2)
      for (int n = 0; n < N; ++n) {
        const lanes first = state[i * N + n] * a[value] + update[n] * key[i];
        const lanes second = state[(i + 1) * N + n] * a[value] + update[n] * key[i + 1];
        state[i * N + n] = first;
        state[(i + 1) * N + n] = second;
        even[n] += first * query[i];
        odd[n] += second * query[i + 1];
      }
    for (int n = 0; n < N; ++n) store(o + (value * N + n) * LANES, even[n] + odd[n]);
  }
}

struct Gradients {
  float *q, *k, *v, *g, *beta;  // g: of the logarithm of a; those of q and k are added to
};

// One step back: `grad` is the gradient of the state after the step and becomes that of the state before it.
template <int N>
void backward_step(const lanes* before, const lanes* error, const float* query, const float* key, const float* out_grad,
                   float a, float beta, int64_t key_dim, lanes* grad, float* dq, float* dk, float* dv, float* dg,
                   float* dbeta) {
  lanes dout[N], update_grad[N] = {}, update[N], value_grad[N], decay = {};
  float update_out = 0;
  for (int n = 0; n < N; ++n) {
    dout[n] = load(out_grad + n * LANES);
    update[n] = error[n] * beta;
    update_out += sum(update[n] * dout[n]);
  }
  for (int64_t i = 0; i < key_dim; ++i)
    for (int n = 0; n < N; ++n) {
      const lanes d = grad[i * N + n] + dout[n] * query[i];
      grad[i * N + n] = d;
      update_grad[n] += d * key[i];
    }
  *dbeta = 0;
  for (int n = 0; n < N; ++n) {
    *dbeta += sum(update_grad[n] * error[n]);
    value_grad[n] = update_grad[n] * beta;
    store(dv + n * LANES, value_grad[n]);
  }
  for (int64_t block = 0; block < key_dim; block += LANES) {
    lanes for_q[LANES], for_k[LANES];
    for (int64_t r = 0; r < LANES; ++r) {
      const int64_t i = block + r;
      for_q[r] = for_k[r] = lanes{};
      for (int n = 0; n < N; ++n) {
        const lanes decayed = before[i * N + n] * a, d = grad[i * N + n], e = d - value_grad[n] * key[i];
        for_q[r] += decayed * dout[n];
        for_k[r] += d * update[n] - decayed * value_grad[n];
        decay += e * decayed;
        grad[i * N + n] = e * a;
      }
    }
    store(dq + block, load(dq + block) + row_sums(for_q) + load(key + block) * update_out);
    store(dk + block, load(dk + block) + row_sums(for_k));
  }
  *dg = sum(decay);
}

template <int N>
void backward_head(const Sizes& z, int64_t b, int64_t head, const float* q, const float* k, const float* v,
                   const float* a, const float* beta, const uint8_t* starts, const float* checkpoints,
                   const float* out_grad, const Gradients& out) {
  const int64_t key_dim = z.key_dim, key_head = head / (z.value_heads / z.key_heads), cells = key_dim * N;
  const int64_t num_segments = (z.length + SEGMENT - 1) / SEGMENT;
  std::vector<lanes> history((SEGMENT + 1) * cells), errors(SEGMENT * N), grad(cells);
  for (int64_t segment = num_segments - 1; segment >= 0; --segment) {
    const int64_t start = segment * SEGMENT, end = start + SEGMENT < z.length ? start + SEGMENT : z.length;
    std::memcpy(history.data(), checkpoints + ((b * z.value_heads + head) * num_segments + segment) * cells * LANES,
                cells * sizeof(lanes));
    for (int64_t t = start; t < end; ++t) {
      const int64_t token = b * z.length + t, value = token * z.value_heads + head;
      const float* key = k + (token * z.key_heads + key_head) * key_dim;
      lanes *before = &history[(t - start) * cells], *after = before + cells, *error = &errors[(t - start) * N];
      if (starts[token]) std::memset(before, 0, cells * sizeof(lanes));
      read_error<N>(before, key, v + value * N * LANES, a[value], key_dim, error);
      for (int64_t i = 0; i < key_dim; ++i)
        for (int n = 0; n < N; ++n)
          after[i * N + n] = before[i * N + n] * a[value] + error[n] * (beta[value] * key[i]);
    }
    for (int64_t t = end - 1; t >= start; --t) {
      const int64_t token = b * z.length + t, value = token * z.value_heads + head;
      const int64_t row = (token * z.key_heads + key_head) * key_dim;
      backward_step<N>(&history[(t - start) * cells], &errors[(t - start) * N], q + row, k + row,
                       out_grad + value * N * LANES, a[value], beta[value], key_dim, grad.data(), out.q + row,
                       out.k + row, out.v + value * N * LANES, out.g + value, out.beta + value);
      if (starts[token]) std::memset(grad.data(), 0, cells * sizeof(lanes));
    }
  }
}

template <int N>
void forward_all(const Sizes& z, const float* q, const float* k, const float* v, const float* a, const float* beta,
                 const uint8_t* starts, float* o, float* checkpoints) {
  for (int64_t b = 0; b < z.batch; ++b)
    for (int64_t head = 0; head < z.value_heads; ++head)
      forward_head<N>(z, b, head, q, k, v, a, beta, starts, o, checkpoints);
}

template <int N>
void backward_all(const Sizes& z, const float* q, const float* k, const float* v, const float* a, const float* beta,
                  const uint8_t* starts, const float* checkpoints, const float* out_grad, const Gradients& out) {
  for (int64_t b = 0; b < z.batch; ++b)
    for (int64_t head = 0; head < z.value_heads; ++head)
      backward_head<N>(z, b, head, q, k, v, a, beta, starts, checkpoints, out_grad, out);
}

// ---- The convolution: y = silu(sum_j taps[j] x[t - (WIDTH - 1) + j]) per channel, inside each document ---------------

constexpr int64_t WIDTH = 4;

// How many tokens before t belong to its document, WIDTH - 1 at most.
int64_t num_earlier(const uint8_t* starts, int64_t t) {
  int64_t count = 0;
  while (count < WIDTH - 1 && count < t && !starts[t - count]) ++count;
  return count;
}

void convolve_token(const float* x, const float* taps, int64_t earlier, int64_t channels, float* __restrict__ sums) {
  const float* now = taps + (WIDTH - 1) * channels;
  for (int64_t c = 0; c < channels; ++c) sums[c] = now[c] * x[c];
  for (int64_t back = 1; back <= earlier; ++back) {
    const float *tap = now - back * channels, *before = x - back * channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] += tap[c] * before[c];
  }
}

}  // namespace

extern "C" {

// x, y [B, T, M]; taps [WIDTH, M]; starts [B, T].
void short_convolution_forward(int64_t batch, int64_t length, int64_t channels, const float* x, const float* taps,
                               const uint8_t* starts, float* y) {
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t) {
      const int64_t at = (b * length + t) * channels;
      convolve_token(x + at, taps, num_earlier(starts + b * length, t), channels, y + at);
      for (int64_t c = 0; c < channels; ++c) y[at + c] /= 1 + std::exp(-y[at + c]);
    }
}

// Gradients of x and of the taps; both come zeroed.
void short_convolution_backward(int64_t batch, int64_t length, int64_t channels, const float* x, const float* taps,
                                const uint8_t* starts, const float* dy, float* __restrict__ dx,
                                float* __restrict__ dtaps) {
  std::vector<float> sums(channels);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t) {
      const int64_t at = (b * length + t) * channels, earlier = num_earlier(starts + b * length, t);
      convolve_token(x + at, taps, earlier, channels, sums.data());
      for (int64_t c = 0; c < channels; ++c) {
        const float gate = 1 / (1 + std::exp(-sums[c]));
        sums[c] = dy[at + c] * gate * (1 + sums[c] * (1 - gate));
      }
      for (int64_t back = 0; back <= earlier; ++back) {
        const int64_t tap = (WIDTH - 1 - back) * channels, from = at - back * channels;
        for (int64_t c = 0; c < channels; ++c) {
          dx[from + c] += taps[tap + c] * sums[c];
          dtaps[tap + c] += x[from + c] * sums[c];
        }
      }
    }
}

int64_t delta_rule_segment() { return SEGMENT; }

// Both return 0, or 1 where the value dim is none of 16, 32, 48, 64. `a` holds the decays themselves (exp of g).
int delta_rule_forward(int64_t batch, int64_t length, int64_t key_heads, int64_t value_heads, int64_t key_dim,
                       int64_t value_dim, const float* q, const float* k, const float* v, const float* a,
                       const float* beta, const uint8_t* starts, float* o, float* checkpoints) {
  const Sizes z{batch, length, key_heads, value_heads, key_dim};
  switch (value_dim) {
    case 16: forward_all<1>(z, q, k, v, a, beta, starts, o, checkpoints); return 0;
    case 32: forward_all<2>(z, q, k, v, a, beta, starts, o, checkpoints); return 0;
    case 48: forward_all<3>(z, q, k, v, a, beta, starts, o, checkpoints); return 0;
    case 64: forward_all<4>(z, q, k, v, a, beta, starts, o, checkpoints); return 0;
  }
  return 1;
}

int delta_rule_backward(int64_t batch, int64_t length, int64_t key_heads, int64_t value_heads, int64_t key_dim,
                        int64_t value_dim, const float* q, const float* k, const float* v, const float* a,
                        const float* beta, const uint8_t* starts, const float* checkpoints, const float* out_grad,
                        float* dq, float* dk, float* dv, float* dg, float* dbeta) {
  const Sizes z{batch, length, key_heads, value_heads, key_dim};
  const Gradients out{dq, dk, dv, dg, dbeta};
  switch (value_dim) {
    case 16: backward_all<1>(z, q, k, v, a, beta, starts, checkpoints, out_grad, out); return 0;
    case 32: backward_all<2>(z, q, k, v, a, beta, starts, checkpoints, out_grad, out); return 0;
    case 48: backward_all<3>(z, q, k, v, a, beta, starts, checkpoints, out_grad, out); return 0;
    case 64: backward_all<4>(z, q, k, v, a, beta, starts, checkpoints, out_grad, out); return 0;
  }
  return 1;
}
}
