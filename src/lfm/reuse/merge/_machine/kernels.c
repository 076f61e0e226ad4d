/* Runs the programs of program.py, a tile at a time, so that everything but inputs and outputs stays in the first cache.
 *
 * kernels.py compiles this when it is first needed, and has a twin of every function in numpy that gives the same bits:
 * no fused multiply-add, sums in a fixed number of lanes. OP_* come from there. REAL is float or double.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define TILE 1024
#define LANES 32

typedef struct {
    int32_t op, to, a, b, c, spare;
    double value;
} Step;

static inline float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* --- inputs: widened; returns whether a number among them is not finite */

static int load_bf16(const uint16_t *from, REAL *to, int count) {
    uint16_t bad = 0;
    for (int i = 0; i < count; i++) {
        to[i] = from_bf16(from[i]);
        bad |= (from[i] & 0x7f80) == 0x7f80;
    }
    return bad;
}

static int load_f16(const uint16_t *from, REAL *to, int count) {
    uint16_t bad = 0;
    const _Float16 *values = (const _Float16 *)from;
    for (int i = 0; i < count; i++) {
        to[i] = (float)values[i];
        bad |= (from[i] & 0x7c00) == 0x7c00;
    }
    return bad;
}

static int load_f32(const float *from, REAL *to, int count) {
    uint32_t bad = 0;
    for (int i = 0; i < count; i++) {
        to[i] = from[i];
        bad |= (bits_of(from[i]) & 0x7f800000u) == 0x7f800000u;
    }
    return bad;
}

static int load_f64(const double *from, REAL *to, int count) {
    int bad = 0;
    for (int i = 0; i < count; i++) {
        to[i] = (REAL)from[i];
        bad |= !(fabs(from[i]) <= 1.7976931348623157e308);
    }
    return bad;
}

static int load(int dtype, const char *from, int64_t place, REAL *to, int count) {
    int bad = 0;
    switch (dtype) {
    case BF16: bad = load_bf16((const uint16_t *)from + place, to, count); break;
    case F16: bad = load_f16((const uint16_t *)from + place, to, count); break;
    case F32: bad = load_f32((const float *)from + place, to, count); break;
    case F64: bad = load_f64((const double *)from + place, to, count); break;
    }
    for (int i = count; i < TILE; i++) to[i] = 0;
    return bad;
}

/* --- outputs: rounded to the nearest even, or up with the probability of what is cut off; returns whether any overflows */

static int store_bf16(const REAL *from, const REAL *noise, uint16_t *to, int count) {
    uint16_t bad = 0;
    for (int i = 0; i < count; i++) {
        uint32_t bits = bits_of((float)from[i]);
        bits += noise ? (uint32_t)(noise[i] * 65536) : 0x7fffu + ((bits >> 16) & 1);
        to[i] = bits >> 16;
        bad |= (to[i] & 0x7f80) == 0x7f80;
    }
    return bad;
}

static int store_f16(const REAL *from, const REAL *noise, uint16_t *to, int count) {
    uint16_t bad = 0;
    _Float16 *values = (_Float16 *)to;
    for (int i = 0; i < count; i++) {
        float x = (float)from[i];
        if (noise) {
            int exponent = (int)((bits_of(x) >> 23) & 0xff) - 127;
            double quantum = ldexp(1.0, (exponent < -14 ? -14 : exponent) - 10);
            x = (float)copysign(floor(fabs((double)x) / quantum + (double)noise[i]) * quantum, (double)x);
        }
        values[i] = (_Float16)x;
        bad |= (to[i] & 0x7c00) == 0x7c00;
    }
    return bad;
}

static int store(int dtype, const REAL *from, const REAL *noise, char *to, int64_t place, int count) {
    int bad = 0;
    if (dtype == BF16) return store_bf16(from, noise, (uint16_t *)to + place, count);
    if (dtype == F16) return store_f16(from, noise, (uint16_t *)to + place, count);
    if (dtype == F32) {
        float *out = (float *)to + place;
        for (int i = 0; i < count; i++) {
            out[i] = (float)from[i];
            bad |= (bits_of(out[i]) & 0x7f800000u) == 0x7f800000u;
        }
        return bad;
    }
    double *out = (double *)to + place;
    for (int i = 0; i < count; i++) {
        out[i] = from[i];
        bad |= !(fabs(out[i]) <= 1.7976931348623157e308);
    }
    return bad;
}

/* --- random numbers: Philox4x32-7 (Salmon et al. 2011, who find 7 rounds to pass every test that they know); element i
 * is word i % 4 of block i / 4 */

#define ROUNDS 7
#define M0 0xD2511F53u
#define M1 0xCD9E8D57u
#define W0 0x9E3779B9u
#define W1 0xBB67AE85u

#ifdef __AVX2__

/* Four blocks at a time, a word in the lower half of 64 bits: what a product leaves in the upper half is never read. */
static void draw_words(uint32_t *words, uint64_t key, uint64_t first) {
    const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
    for (int i = 0; i < TILE / 4; i += 4) {
        __m256i x0 = _mm256_add_epi64(_mm256_set1_epi64x((int64_t)first + i), _mm256_set_epi64x(3, 2, 1, 0));
        __m256i x1 = _mm256_srli_epi64(x0, 32), x2 = _mm256_setzero_si256(), x3 = x2;
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        for (int round = 0; round < ROUNDS; round++) {
            __m256i p = _mm256_mul_epu32(x0, m0), q = _mm256_mul_epu32(x2, m1);
            x0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(q, 32), x1), _mm256_set1_epi64x(k0));
            x2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p, 32), x3), _mm256_set1_epi64x(k1));
            x1 = q, x3 = p;
            k0 += W0, k1 += W1;
        }
        __m256i one = _mm256_blend_epi32(x0, _mm256_slli_epi64(x1, 32), 0xAA);
        __m256i two = _mm256_blend_epi32(x2, _mm256_slli_epi64(x3, 32), 0xAA);
        __m256i even = _mm256_unpacklo_epi64(one, two), odd = _mm256_unpackhi_epi64(one, two);
        _mm256_storeu_si256((__m256i *)(words + 4 * i), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(words + 4 * i + 8), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

#else

static void draw_words(uint32_t *words, uint64_t key, uint64_t first) {
    for (int i = 0; i < TILE / 4; i++) {
        uint32_t x0 = (uint32_t)(first + i), x1 = (uint32_t)((first + i) >> 32), x2 = 0, x3 = 0;
        uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
        for (int round = 0; round < ROUNDS; round++) {
            uint64_t p = (uint64_t)M0 * x0, q = (uint64_t)M1 * x2;
            x0 = (uint32_t)(q >> 32) ^ x1 ^ k0;
            x1 = (uint32_t)q;
            x2 = (uint32_t)(p >> 32) ^ x3 ^ k1;
            x3 = (uint32_t)p;
            k0 += W0, k1 += W1;
        }
        words[4 * i] = x0, words[4 * i + 1] = x1, words[4 * i + 2] = x2, words[4 * i + 3] = x3;
    }
}

#endif

static void draw(REAL *restrict to, uint64_t key, uint64_t place) {
    uint32_t words[TILE];
    draw_words(words, key, place / 4);
    for (int i = 0; i < TILE; i++) to[i] = (REAL)((float)(int32_t)(words[i] >> 8) * 0x1p-24f);
}

/* --- exp and tanh for |x| <= 700, in double: of + - * / alone, so that the numpy twin gives the same bits
 *
 * x = k ln 2 + r with a whole number k, so e^x = 2^k e^r; `rest` becomes e^r - 1 by its Taylor series, which is exact to
 * the last bits for |r| <= ln 2 / 2, and `power` 2^k. Adding 1.5 * 2^52 rounds to whole numbers, which then are the low
 * bits. */

static const double TERMS[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                               1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                               1.0 / 6,          1.0 / 2,         1.0};

static inline void split_power(double x, double *power, double *rest) {
    double shifted = x * 0x1.71547652b82fep0 + 0x1.8p52, k = shifted - 0x1.8p52;
    double r = (x - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33; /* ln 2 in two parts */
    double sum = TERMS[0];
    for (int i = 1; i < 13; i++) sum = sum * r + TERMS[i];
    *rest = sum * r;
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    memcpy(power, &bits, 8);
}

static inline double exponential(double x) {
    double power, rest;
    split_power(x, &power, &rest);
    return power * rest + power;
}

static inline double hyperbolic_tangent(double x) {
    double power, rest;
    split_power(2 * x, &power, &rest);
    double grown = power * rest + (power - 1); /* e^2x - 1 */
    return grown / (grown + 2);
}

/* --- conditions that are kept: a bit for each element, the lowest of a byte first */

static void keep(const REAL *from, uint8_t *bits, int count) {
    uint8_t flags[TILE];
    for (int i = 0; i < TILE; i++) flags[i] = i < count && from[i] != 0;
    for (int i = 0; i < count; i += 8) {
        uint64_t eight;
        memcpy(&eight, flags + i, 8);
        bits[i / 8] = (uint8_t)(eight * 0x0102040810204080u >> 56); /* moves bit 8 j to bit 56 + j */
    }
}

static void recall(const uint8_t *bits, REAL *to, int count) {
    uint8_t flags[TILE] = {0};
    for (int i = 0; i < count; i += 8) {
        uint64_t eight = bits[i / 8] * 0x0101010101010101u & 0x8040201008040201u;
        memcpy(flags + i, &eight, 8);
    }
    for (int i = 0; i < TILE; i++) to[i] = (REAL)(flags[i] != 0);
}

/* --- what is found out about all elements */

static void add_products(const REAL *a, const REAL *b, double *lanes, int count) {
    double sums[LANES];
    memcpy(sums, lanes, sizeof sums);
    int i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; j++) sums[j] += (double)a[i + j] * (double)b[i + j];
    for (int j = 0; i < count; i++, j++) sums[j] += (double)a[i] * (double)b[i];
    memcpy(lanes, sums, sizeof sums);
}

static void count_high(const REAL *from, uint32_t *counts, int count) {
    for (int i = 0; i < count; i++) counts[(bits_of((float)from[i]) & 0x7fffffffu) >> 16]++;
}

static void count_low(const REAL *from, uint32_t high, uint32_t *counts, int count) {
    uint32_t bits[LANES];
    for (int i = 0; i < count; i += LANES) {
        int many = count - i < LANES ? count - i : LANES;
        uint32_t any = 0;
        if (many == LANES) {
            for (int j = 0; j < LANES; j++) {
                bits[j] = bits_of((float)from[i + j]) & 0x7fffffffu;
                any |= (bits[j] >> 16) == high;
            }
        } else {
            for (int j = 0; j < many; j++) bits[j] = bits_of((float)from[i + j]) & 0x7fffffffu;
            any = 1;
        }
        if (!any) continue;
        for (int j = 0; j < many; j++)
            if (bits[j] >> 16 == high) counts[bits[j] & 0xffff]++;
    }
}

static void look_for_largest(const REAL *from, double *largest, int count) {
    REAL most = (REAL)*largest;
    for (int i = 0; i < count; i++) most = most < from[i] ? from[i] : most;
    *largest = most;
}

/* --- the machine */

#define EACH(expression)                                                                                               \
    for (int i = 0; i < TILE; i++) to[i] = (expression);                                                               \
    break

/* Runs `steps` over elements 0 .. count of every input; `place` is where in their tensor they lie. The first `constants`
 * registers hold what their steps' values say. `bad` gets a 1 for each input with numbers that are not finite, and one
 * more, the last, for the output. */
int lfm_run(const Step *steps, int length, int registers, int constants, const double *values, char *const *inputs,
            const int32_t *dtypes, int n_inputs, const uint64_t *keys, uint8_t *bits, int64_t bits_row, char *output,
            int output_dtype, int64_t place, int64_t count, double *lanes, double *largest, uint32_t *counts, int32_t *bad) {
    REAL *file = NULL;
    if (posix_memalign((void **)&file, 64, (size_t)registers * TILE * sizeof(REAL))) return 1;
    for (int r = 0; r < constants; r++)
        for (int i = 0; i < TILE; i++) file[r * TILE + i] = (REAL)values[r];
    for (int64_t begin = 0; begin < count; begin += TILE) {
        int many = count - begin < TILE ? (int)(count - begin) : TILE;
        for (const Step *step = steps; step < steps + length; step++) {
            REAL *restrict to = file + (size_t)step->to * TILE;
            const REAL *a = file + (size_t)step->a * TILE, *b = file + (size_t)step->b * TILE,
                       *c = file + (size_t)step->c * TILE;
            switch (step->op) {
            case OP_INPUT: bad[step->a] |= load(dtypes[step->a], inputs[step->a], begin, to, many); break;
            case OP_RANDOM: draw(to, keys[step->a], (uint64_t)(place + begin)); break;
            case OP_ADD: EACH(a[i] + b[i]);
            case OP_SUB: EACH(a[i] - b[i]);
            case OP_MUL: EACH(a[i] * b[i]);
            case OP_DIV: EACH(a[i] / b[i]);
            case OP_ABS: EACH((REAL)FABS(a[i]));
            case OP_SQRT: EACH((REAL)SQRT(a[i]));
            case OP_SIGN: EACH((REAL)((a[i] > 0) - (a[i] < 0)));
            case OP_MIN: EACH(b[i] < a[i] ? b[i] : a[i]);
            case OP_MAX: EACH(a[i] < b[i] ? b[i] : a[i]);
            case OP_LT: EACH((REAL)(a[i] < b[i]));
            case OP_LE: EACH((REAL)(a[i] <= b[i]));
            case OP_EQ: EACH((REAL)(a[i] == b[i]));
            case OP_WHERE: EACH(a[i] != 0 ? b[i] : c[i]);
            case OP_EXP: EACH((REAL)exponential((double)a[i]));
            case OP_TANH: EACH((REAL)hyperbolic_tangent((double)a[i]));
            case OP_RECALL: recall(bits + step->a * bits_row + (place + begin) / 8, to, many); break;
            case OP_KEEP: keep(a, bits + step->to * bits_row + (place + begin) / 8, many); break;
            case OP_STORE: bad[n_inputs] |= store(output_dtype, a, step->b < 0 ? NULL : b, output, begin, many); break;
            case OP_DOT: add_products(a, b, lanes + (size_t)step->to * LANES, many); break;
            case OP_LARGEST: look_for_largest(a, largest + step->to, many); break;
            case OP_HIGH: count_high(a, counts + ((size_t)step->to << 16), many); break;
            case OP_LOW: count_low(a, (uint32_t)step->value, counts + ((size_t)step->to << 16), many); break;
            }
        }
    }
    free(file);
    return 0;
}

/* --- ranks within rows
 *
 * A pair holds a magnitude's bits and, below them, its place, so that pairs in order are magnitudes in order, and equal
 * ones by their places. */

static uint64_t pair_of(float value, int64_t place) {
    return (uint64_t)(bits_of(value) & 0x7fffffffu) << 32 | (uint64_t)place;
}

static void starts(uint32_t *counts, int64_t many) {
    uint32_t sum = 0;
    for (int64_t i = 0; i < many; i++) {
        uint32_t here = counts[i];
        counts[i] = sum;
        sum += here;
    }
}

/* Sorts in any case: a byte at a time, from the lowest. */
static uint64_t *sort_by_bytes(const float *values, int64_t row, uint64_t *pairs, uint64_t *others) {
    uint32_t counts[4][256] = {{0}};
    for (int64_t i = 0; i < row; i++) {
        uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
        pairs[i] = pair_of(values[i], i);
        counts[0][bits & 255]++, counts[1][bits >> 8 & 255]++, counts[2][bits >> 16 & 255]++, counts[3][bits >> 24]++;
    }
    for (int digit = 0; digit < 4; digit++) {
        uint32_t shift = 32 + 8 * digit;
        if (counts[digit][pairs[0] >> shift & 255] == row) continue; /* all alike in this byte */
        starts(counts[digit], 256);
        for (int64_t i = 0; i < row; i++) others[counts[digit][pairs[i] >> shift & 255]++] = pairs[i];
        uint64_t *swap = pairs;
        pairs = others, others = swap;
    }
    return pairs;
}

/* Sorts magnitudes that are spread out, as those of trained weights are, in one pass: into buckets of equal width, which
 * leaves little to put in order. Returns NULL, and leaves it to bytes, where too many share a bucket. */
static uint64_t *sort_by_size(const float *values, int64_t row, uint64_t *pairs, uint32_t *counts, int64_t buckets) {
    uint32_t most = 0;
    for (int64_t i = 0; i < row; i++) {
        uint32_t bits = bits_of(values[i]) & 0x7fffffffu;
        most = most < bits ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    float scale = (float)(buckets - 1) / largest;
    if (!(scale <= 3.4028235e38f) || !(scale > 0)) return NULL;
    memset(counts, 0, (size_t)buckets * 4);
    for (int64_t i = 0; i < row; i++) counts[(int32_t)(fabsf(values[i]) * scale)]++;
    starts(counts, buckets);
    for (int64_t i = 0; i < row; i++) pairs[counts[(int32_t)(fabsf(values[i]) * scale)]++] = pair_of(values[i], i);
    int64_t moves = 0;
    for (int64_t i = 1; i < row && moves <= 8 * row; i++) {
        uint64_t pair = pairs[i];
        int64_t j = i;
        for (; j && pairs[j - 1] > pair; j--) pairs[j] = pairs[j - 1];
        pairs[j] = pair;
        moves += i - j;
    }
    return moves <= 8 * row ? pairs : NULL;
}

int lfm_rank_rows(float *values, int64_t count, int64_t row) {
    int64_t buckets = 2;
    while (buckets < row && buckets < 1 << 20) buckets *= 2;
    uint64_t *pairs = malloc((size_t)row * 16 + (size_t)buckets * 4);
    if (!pairs) return 1;
    for (float *begin = values; begin < values + count; begin += row) {
        uint64_t *sorted = sort_by_size(begin, row, pairs, (uint32_t *)(pairs + 2 * row), buckets);
        if (!sorted) sorted = sort_by_bytes(begin, row, pairs, pairs + row);
        float step = row > 1 ? 1.0f / (float)(row - 1) : 0.5f;
        for (int64_t i = 0; i < row; i++) begin[(uint32_t)sorted[i]] = row > 1 ? (float)i * step : 0.5f;
    }
    free(pairs);
    return 0;
}
