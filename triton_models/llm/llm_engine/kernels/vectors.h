/* Vectors of numbers, and what products and attention share of them. Each file includes it for itself. */

#ifndef TIDEGATE_VECTORS_H
#define TIDEGATE_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8 /* that are multiplied at once with what is read of the weights */
#else
#define LANES 8
#define ROWS 4
#endif
/* The cases of a switch over how many of ROWS there are. */
#if ROWS == 8
#define FOR_EACH_COUNT(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#else
#define FOR_EACH_COUNT(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif

#define TILE (2 * LANES) /* outputs whose weights are packed side by side */

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define OUTLINED __attribute__((noinline))

/* Below so many numbers, a second thread costs more than it saves. */
#define WORTH_THREADS 16384

INLINE Floats load(const float *from) { return *(const Floats *)from; }
INLINE void store(float *to, Floats value) { *(Floats *)to = value; }
INLINE Floats all(float value) { return value - (Floats){0}; }

INLINE float total(Floats value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)value);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
#endif
}

INLINE Floats from_bf16(const uint16_t *from) {
#if defined(__AVX2__) && LANES == 8
    /* GCC 12 takes four instructions for it. */
    Words words = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    Words words = __builtin_convertvector(*(const Halves *)from, Words);
#endif
    return (Floats)(words << 16);
}

/* Memory for a team of threads, which frees it when all are done. */
INLINE void *shared_memory(int64_t bytes) { return bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : NULL; }

INLINE uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* LANES numbers of IEEE half precision. */
INLINE Floats from_fp16(const uint16_t *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
    Floats value;
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t half = from[lane], sign = (half & 0x8000) << 16, rest = half & 0x7fff, bits;
        float number;
        if (rest >= 0x7c00) bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
        else if (rest >= 0x400) bits = sign | ((rest << 13) + 0x38000000);
        else { number = (float)rest * 0x1p-24f; memcpy(&bits, &number, 4); bits |= sign; }
        memcpy(&number, &bits, 4);
        value[lane] = number;
    }
    return value;
#endif
}

/* The larger of each lane; of the first one's, what is not a number stays so. */
INLINE Floats larger(Floats x, Floats y) {
    Ints other = (Ints)(x <= y);
    return (Floats)(((Ints)x & ~other) | ((Ints)y & other));
}

/* The larger of each lane and a bound; what is not a number stays so. */
INLINE Floats at_least(Floats x, float bound) {
    Ints below = (Ints)(x < bound);
    return (Floats)(((Ints)x & ~below) | ((Ints)all(bound) & below));
}

/* e to the power of each lane, to about one unit in the last place, for arguments of at most 88. */
INLINE Floats exponential(Floats x) {
    x = at_least(x, -87.0f);
    /* Adding this constant leaves no digit behind the point. */
    Floats whole = x * 1.44269504f + 12582912.0f - 12582912.0f;
    Ints power = __builtin_convertvector(whole, Ints);
    Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats sum = all(1.9875691500e-4f);
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * (Floats)((power + 127) << 23);
}

INLINE void norm_row(const float *x, const float *weight, float epsilon, float *out, int64_t size) {
    Floats squares = {0};
    int64_t index = 0;
    for (; index + LANES <= size; index += LANES) squares += load(x + index) * load(x + index);
    float sum = total(squares);
    for (; index < size; index++) sum += x[index] * x[index];
    float scale = 1.0f / sqrtf(sum / size + epsilon);
    for (index = 0; index + LANES <= size; index += LANES)
        store(out + index, load(x + index) * scale * load(weight + index));
    for (; index < size; index++) out[index] = x[index] * scale * weight[index];
}

/* LANES vectors to LANES others: the first lanes, the second ones, and so on. */
INLINE void transpose(Floats rows[LANES]) {
#if LANES == 16
#define FRONT(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define BACK(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#else
#define FRONT(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define BACK(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#endif
    /* Each round deals the second half of the rows in between the lanes of the first. */
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        Floats dealt[LANES];
        for (int row = 0; row < LANES / 2; row++) {
            dealt[2 * row] = FRONT(rows[row], rows[row + LANES / 2]);
            dealt[2 * row + 1] = BACK(rows[row], rows[row + LANES / 2]);
        }
        for (int row = 0; row < LANES; row++) rows[row] = dealt[row];
    }
}

/* `rows` rows times one tile of fp32, whose inputs lie `step` apart. */
INLINE void many_rows(
    int rows, const float *weights, int64_t step, const float *x, int64_t stride, int64_t inputs, Floats sums[][2]
) {
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = (Floats){0};
#pragma GCC unroll 2
    for (int64_t input = 0; input < inputs; input++, weights += step) {
        Floats low = load(weights), high = load(weights + LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            sums[row][0] += low * x[row * stride + input];
            sums[row][1] += high * x[row * stride + input];
        }
    }
}

#endif
