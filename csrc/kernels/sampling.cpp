// Sampling without sorting the vocabulary. Tokens are ordered by descending logit, lower id first on a tie. top_k,
// top_p and min_p each keep a prefix of that order, so what is kept is one bound: all logits above it and the first
// `ties` tokens equal to it. The bound is found by radix selection: a histogram (count and mass) of the highest 11 bits
// of all logits, then of the next bits of the tokens in the bin where the bound lies.
#include "leaves.hpp"
#include "simd.hpp"

namespace pando {
namespace PANDO_LEVEL {

namespace {

constexpr int64_t BLOCK = 256; // tokens whose weights are computed at a time
constexpr int64_t BINS = 2048;
constexpr uint32_t NO_BOUND = 0;
constexpr float GREEDY = 1e-6f;
constexpr float LOWEST = -__builtin_inff();

// Bits that order like the floats themselves; 0.0 and -0.0 are equal.
uint32_t order_key(float x) {
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// The formula is part of the contract: pando.kernels.reference states it.
double uniform(int64_t seed, int64_t position) {
    const uint64_t golden = 0x9E3779B97F4A7C15u;
    const uint64_t word = mix(mix(static_cast<uint64_t>(seed) + golden) + static_cast<uint64_t>(position) * golden);
    return static_cast<double>(word >> 11) * 0x1p-53;
}

float largest(const float* x, int64_t n) {
    vf best = splat(LOWEST);
    for_row(
        n, [&](int64_t i) { best = vmax(load(x + i), best); },
        [&](int64_t i, int64_t rest) {
            for (int64_t lane = 0; lane < rest; ++lane) best[0] = x[i + lane] > best[0] ? x[i + lane] : best[0];
        });
    return max_lane(best);
}

// The first position of the largest value, and that value: only the block that holds it is searched.
int64_t first_largest(const float* x, int64_t n, float& top) {
    int64_t block = 0;
    top = LOWEST;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        const float best = largest(x + begin, smaller(BLOCK, n - begin));
        if (best > top) {
            top = best;
            block = begin;
        }
    }
    for (int64_t i = block; i < smaller(block + BLOCK, n); ++i) {
        if (x[i] == top) return i;
    }
    return 0; // only if no logit is a number
}

bool all_finite(const float* x, int64_t n) {
    vf total{}; // 0 * x is 0, or NaN for an infinity or a NaN
    for_row(
        n, [&](int64_t i) { total += load(x + i) * 0.0f; },
        [&](int64_t i, int64_t rest) { total += load_first(x + i, rest) * 0.0f; });
    return sum(total) == 0.0f;
}

struct Row {
    const float* logits;
    int64_t vocab;
    float top;     // largest logit
    float inverse; // 1 / temperature

    // exp((logit - top) / temperature) of tokens [begin, begin + n), n <= BLOCK.
    void weights(int64_t begin, int64_t n, float* out) const {
        const float* x = logits + begin;
        for_row(
            n, [&](int64_t i) { store(out + i, vexp((load(x + i) - top) * inverse)); },
            [&](int64_t i, int64_t rest) {
                store_first(out + i, vexp((load_first(x + i, rest) - top) * inverse), rest);
            });
    }
};

struct Candidate {
    uint32_t key;
    float weight;
};

// What is kept: tokens with a key above `key`, and the first `ties` (by id) with that very key; `mass` of both.
struct Bound {
    uint32_t key = NO_BOUND;
    int64_t ties = 0;
    double mass = 0.0;
};

struct Histogram {
    uint32_t count[BINS];
    double mass[BINS];

    void clear() { memset(this, 0, sizeof *this); }
    void add(int64_t bin, float weight) {
        ++count[bin];
        mass[bin] += weight;
    }
};

struct Scratch {
    Histogram* histogram;
    Candidate* candidates; // [vocab]
    double* block_mass;    // [blocks]
    int64_t* block_ties;   // [blocks] ties to the bound before the block
};

void fill_histogram(const Row& row, Histogram& histogram) {
    float weights[BLOCK];
    histogram.clear();
    for (int64_t begin = 0; begin < row.vocab; begin += BLOCK) {
        const int64_t n = smaller(BLOCK, row.vocab - begin);
        row.weights(begin, n, weights);
        for (int64_t i = 0; i < n; ++i) histogram.add(order_key(row.logits[begin + i]) >> 21, weights[i]);
    }
}

double total_mass(const Histogram& histogram) {
    double total = 0.0;
    for (int64_t bin = 0; bin < BINS; ++bin) total += histogram.mass[bin];
    return total;
}

// The bin, from the highest down, in which the wanted count (or else mass) is reached; what lies above is taken off.
int64_t find_bin(const Histogram& histogram, int64_t bins, bool by_count, int64_t& count, double& mass, Bound& bound) {
    int64_t last = -1;
    for (int64_t bin = bins - 1; bin >= 0; --bin) {
        if (histogram.count[bin] == 0) continue;
        const bool reached = by_count ? histogram.count[bin] >= count : histogram.mass[bin] >= mass;
        if (reached) return bin;
        last = bin;
        count -= histogram.count[bin];
        mass -= histogram.mass[bin];
        bound.mass += histogram.mass[bin];
    }
    // Rounding left a crumb of the wanted mass: the lowest bin is where it ends.
    count += histogram.count[last];
    mass += histogram.mass[last];
    bound.mass -= histogram.mass[last];
    return last;
}

int64_t gather(const Row& row, int64_t bin, Candidate* candidates) {
    float weights[BLOCK];
    int64_t n = 0;
    for (int64_t begin = 0; begin < row.vocab; begin += BLOCK) {
        const int64_t size = smaller(BLOCK, row.vocab - begin);
        row.weights(begin, size, weights);
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t key = order_key(row.logits[begin + i]);
            candidates[n] = {key, weights[i]};
            n += (key >> 21) == static_cast<uint32_t>(bin);
        }
    }
    return n;
}

int64_t narrow(Candidate* candidates, int64_t n, int shift, uint32_t mask, int64_t bin) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        candidates[kept] = candidates[i];
        kept += ((candidates[kept].key >> shift) & mask) == static_cast<uint32_t>(bin);
    }
    return kept;
}

// The bound after `count` tokens (by_count), or where `mass` is first reached. Needs the row's first histogram.
Bound select(const Row& row, Scratch& scratch, bool by_count, int64_t count, double mass) {
    Bound bound;
    Histogram& histogram = *scratch.histogram;
    int64_t bin = find_bin(histogram, BINS, by_count, count, mass, bound);
    int64_t n = gather(row, bin, scratch.candidates);
    const struct {
        int shift;
        uint32_t mask;
    } levels[] = {{10, 2047}, {0, 1023}};
    for (const auto& level : levels) {
        histogram.clear();
        for (int64_t i = 0; i < n; ++i) {
            histogram.add((scratch.candidates[i].key >> level.shift) & level.mask, scratch.candidates[i].weight);
        }
        bin = find_bin(histogram, level.mask + 1, by_count, count, mass, bound);
        n = narrow(scratch.candidates, n, level.shift, level.mask, bin);
    }
    bound.key = scratch.candidates[0].key;
    const double weight = scratch.candidates[0].weight;
    if (by_count) {
        bound.ties = smaller(count, n);
    } else {
        bound.ties = 1;
        while (bound.ties < n && static_cast<double>(bound.ties) * weight < mass) ++bound.ties;
    }
    bound.mass += static_cast<double>(bound.ties) * weight;
    return bound;
}

bool is_tighter(const Bound& a, const Bound& b) { return a.key > b.key || (a.key == b.key && a.ties < b.ties); }

Bound find_bound(const Row& row, Scratch& scratch, int32_t top_k, float top_p) {
    const bool few = top_k > 0 && top_k < row.vocab;
    Bound bound;
    if (!few && top_p >= 1.0f) return bound;
    fill_histogram(row, *scratch.histogram);
    double mass = total_mass(*scratch.histogram);
    if (few) {
        bound = select(row, scratch, true, top_k, 0.0);
        mass = bound.mass;
    }
    if (top_p < 1.0f) {
        if (few) fill_histogram(row, *scratch.histogram);
        const Bound nucleus = select(row, scratch, false, 0, static_cast<double>(top_p) * mass);
        if (is_tighter(nucleus, bound)) bound = nucleus;
    }
    return bound;
}

// Weights of a block with 0 for what is not kept; `ties` counts the tokens at the bound seen so far.
void kept_weights(const Row& row, const Bound& bound, float min_p, int64_t begin, int64_t n, int64_t& ties,
                  float* out) {
    row.weights(begin, n, out);
    if (bound.key != NO_BOUND) {
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t key = order_key(row.logits[begin + i]);
            const bool tie = key == bound.key;
            const bool kept = key > bound.key || (tie && ties < bound.ties);
            ties += tie;
            out[i] = kept ? out[i] : 0.0f;
        }
    }
    if (min_p > 0.0f) {
        for (int64_t i = 0; i < n; ++i) out[i] = out[i] >= min_p ? out[i] : 0.0f;
    }
}

double block_sum(const float* weights, int64_t n) {
    double lanes[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(weights[i + lane]);
    }
    for (; i < n; ++i) lanes[0] += static_cast<double>(weights[i]);
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Inverse CDF in id order: masses of blocks first, then the tokens of the block where u falls.
int64_t draw(const Row& row, const Bound& bound, float min_p, double u, Scratch& scratch) {
    float weights[BLOCK];
    const int64_t blocks = (row.vocab + BLOCK - 1) / BLOCK;
    double total = 0.0;
    int64_t ties = 0, last = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * BLOCK, n = smaller(BLOCK, row.vocab - begin);
        scratch.block_ties[block] = ties;
        kept_weights(row, bound, min_p, begin, n, ties, weights);
        scratch.block_mass[block] = block_sum(weights, n);
        total += scratch.block_mass[block];
    }
    const double target = u * total;
    double before = 0.0;
    for (int64_t block = 0; block < blocks; before += scratch.block_mass[block], ++block) {
        const bool is_last_mass = before + scratch.block_mass[block] >= total;
        if (before + scratch.block_mass[block] <= target && !is_last_mass) continue;
        const int64_t begin = block * BLOCK, n = smaller(BLOCK, row.vocab - begin);
        ties = scratch.block_ties[block];
        kept_weights(row, bound, min_p, begin, n, ties, weights);
        double reached = before;
        for (int64_t i = 0; i < n; ++i) {
            reached += static_cast<double>(weights[i]);
            if (weights[i] > 0.0f) last = begin + i;
            if (reached > target && weights[i] > 0.0f) return begin + i;
        }
    }
    return last; // rounding: u * total reached the total
}

template <class T>
T* carve(char*& scratch, int64_t count) {
    T* piece = reinterpret_cast<T*>(scratch);
    scratch += round_up(count * int64_t{sizeof(T)}, 64);
    return piece;
}

} // namespace

int64_t sample_scratch(const SampleArgs& args) {
    const int64_t blocks = (args.vocab + BLOCK - 1) / BLOCK;
    return int64_t{sizeof(Histogram)} + args.vocab * int64_t{sizeof(Candidate)} + blocks * 16 + 4 * 64;
}

void sample(const SampleArgs& args, int64_t r, char* memory) {
    Row row;
    row.logits = args.logits + r * args.vocab;
    row.vocab = args.vocab;
    const float temperature = args.temperature[r];
    if (temperature < GREEDY) {
        args.out[r] = first_largest(row.logits, row.vocab, row.top);
        return;
    }
    row.top = largest(row.logits, row.vocab);
    row.inverse = 1.0f / temperature;
    Scratch scratch;
    scratch.histogram = carve<Histogram>(memory, 1);
    scratch.candidates = carve<Candidate>(memory, args.vocab);
    scratch.block_mass = carve<double>(memory, (args.vocab + BLOCK - 1) / BLOCK);
    scratch.block_ties = carve<int64_t>(memory, (args.vocab + BLOCK - 1) / BLOCK);
    const Bound bound = find_bound(row, scratch, args.top_k[r], args.top_p[r]);
    args.out[r] = draw(row, bound, args.min_p[r], uniform(args.seeds[r], args.positions[r]), scratch);
}

void scan(const ScanArgs& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const float* x = args.logits + r * args.vocab;
        float top;
        if (args.argmax != nullptr) args.argmax[r] = first_largest(x, args.vocab, top);
        if (args.finite != nullptr) args.finite[r] = all_finite(x, args.vocab);
    }
}

void mask(const MaskArgs& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        float* x = args.logits + r * args.vocab;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(args.mask + r * args.mask_stride);
        for (int64_t at = 0; at < args.vocab; at += 32) {
            const uint32_t word = words[at / 32];
            if (word == 0xffffffffu) continue;
            const int64_t end_of_word = smaller(at + 32, args.vocab);
            for (int64_t i = at; i < end_of_word; ++i) {
                if (!(word >> (i - at) & 1u)) x[i] = LOWEST;
            }
        }
    }
}

void logprob(const LogprobArgs& args, int64_t begin, int64_t end) {
    float weights[BLOCK];
    for (int64_t r = begin; r < end; ++r) {
        Row row{args.logits + r * args.vocab, args.vocab, 0.0f, 1.0f};
        row.top = largest(row.logits, row.vocab);
        double total = 0.0;
        for (int64_t at = 0; at < row.vocab; at += BLOCK) {
            const int64_t n = smaller(BLOCK, row.vocab - at);
            row.weights(at, n, weights);
            total += block_sum(weights, n);
        }
        args.out[r] = static_cast<float>(row.logits[args.token_ids[r]] - row.top - log(total));
    }
}

} // namespace PANDO_LEVEL
} // namespace pando
