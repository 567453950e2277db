/* Rows as whole numbers, and their products with the digits of weights of four and eight bits. Each file includes it for itself.
 *
 * A group of a row's inputs is counted in a unit of its own, of which its largest input is the most that its numbers
 * hold: of signed bytes, or of twice as many bits, which is closer than bf16. Processors multiply bytes in two ways:
 *
 * AVX512-VNNI multiplies bytes without a sign by ones with, and sums four products in 32 bits. Numbers of 15 bits are two
 * planes of bytes, the higher ones first.
 *
 * AVX2 and AVX512-BW sum but two products, in 16 bits, which hold what a group of digits of four bits can come to. Digits
 * of eight bits, and numbers of 16, they multiply as pairs of 16 bits, whose products they sum in 32.
 */

#ifndef TIDEGATE_DIGITS_H
#define TIDEGATE_DIGITS_H

#include "unit.h"

enum { FOUR_BITS = 4, EIGHT_BITS = 8, BF16 = 16, FP16 = 17 };

#define GROUP UNIT_INPUTS /* inputs that share a scale */

#define WORDS_AHEAD 1024

/* Weights are asked for before they are needed: left to itself, a processor waits for them half of the time. */
INLINE void ask_ahead(const uint32_t *words) { __builtin_prefetch(words + WORDS_AHEAD); }

#if HAS_BYTES

#if HAS_DOTS_OF_BYTES
#define LOW_BITS 7 /* lower bytes are from -64 to 63 */
#define MOST_UNITS(planes) ((planes) == 2 ? 16319 : 127)
#define SMALLEST_DIGIT -128 /* from which those of eight bits are counted */
#define NARROW_ROWS(planes) ((planes) == 2 ? 4 : 8) /* that are multiplied at once */
#else
#define MOST_UNITS(planes) ((planes) == 2 ? 32767 : 127)
#define SMALLEST_DIGIT 0
#define NARROW_ROWS(planes) ROWS
#if LANES == 16
typedef __m512i Digits;
#define WIDE(operation) _mm512_##operation
#else
typedef __m256i Digits;
#define WIDE(operation) _mm256_##operation
#endif
#endif

/* What one unit of a group is, whose largest input has these bits, and how many units 1 is. What is not finite makes the
 * group's part of every sum not a number.
 */
INLINE float unit_of(uint32_t bits, int planes, float *inverse) {
    float most;
    memcpy(&most, &bits, 4);
    *inverse = bits >= 0x7f800000 || most < 0x1p-100f ? 0 : MOST_UNITS(planes) / most;
    return bits >= 0x7f800000 ? NAN : *inverse == 0 ? 0 : most / MOST_UNITS(planes);
}

#if HAS_DOTS_OF_BYTES

/* A group's inputs, in the order in which the weights' digits come out of their words; `unit` is its unit, and the sum of
 * its inputs.
 */
INLINE void to_units(int packing, int planes, const float *from, void *place, float unit[2]) {
    const __m512i sign = _mm512_set1_epi32(0x7fffffff);
    int8_t *to = place;
    __m512 values[2] = {(__m512)load(from), (__m512)load(from + LANES)};
    __m512i larger_one = _mm512_max_epu32(
        _mm512_and_si512((__m512i)values[0], sign), _mm512_and_si512((__m512i)values[1], sign));
    float inverse;
    unit[0] = unit_of(_mm512_reduce_max_epu32(larger_one), planes, &inverse);
    __m128i bytes[2][2];
    int sum = 0;
    for (int half = 0; half < 2; half++) {
        __m512i units = _mm512_cvtps_epi32(_mm512_mul_ps(values[half], _mm512_set1_ps(inverse)));
        if (planes == 2) {
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(units, _mm512_set1_epi32(1 << (LOW_BITS - 1))), LOW_BITS);
            bytes[0][half] = _mm512_cvtepi32_epi8(high);
            bytes[1][half] = _mm512_cvtepi32_epi8(_mm512_sub_epi32(units, _mm512_slli_epi32(high, LOW_BITS)));
        } else {
            bytes[0][half] = _mm512_cvtepi32_epi8(units);
        }
        sum += _mm512_reduce_add_epi32(units);
    }
    unit[1] = unit[0] * sum;
    /* Of four bits, a word's even inputs, then its odd ones. */
    const __m128i dealt = _mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
    for (int plane = 0; plane < planes; plane++)
        for (int half = 0; half < 2; half++) {
            __m128i some = bytes[plane][half];
            if (packing == FOUR_BITS) some = _mm_shuffle_epi8(some, dealt);
            _mm_storeu_si128((__m128i *)(to + plane * GROUP + half * LANES), some);
        }
}

/* Of a group, the sums of digits times units: of TILE outputs, whose words these are, and `rows` rows, `stride` bytes
 * apart.
 */
INLINE void multiply_units(
    int packing, int planes, int rows, const uint32_t *words, const uint8_t *units, int64_t stride, Ints sums[][2]
) {
    __m512i parts[NARROW_ROWS(1)][2][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) parts[row][half][0] = parts[row][half][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int four = 0; four < GROUP / 4; four++) {
        Words digits[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            if (packing == EIGHT_BITS || four % 2 == 0) ask_ahead(words + half * LANES);
            /* Four digits of each output, as bytes without a sign. */
            Words some = *(const Words *)(words + half * LANES);
            if (packing == FOUR_BITS) digits[half] = (four % 2 ? some >> 4 : some) & 0x0f0f0f0f;
            else digits[half] = some ^ 0x80808080;
        }
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
#pragma GCC unroll 2
            for (int plane = 0; plane < planes; plane++) {
                int32_t inputs;
                memcpy(&inputs, units + row * stride + plane * GROUP + four * 4, 4);
                __m512i several = _mm512_set1_epi32(inputs);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    __m512i *part = &parts[row][half][plane];
                    *part = _mm512_dpbusd_epi32(*part, (__m512i)digits[half], several);
                }
            }
        }
        if (packing == EIGHT_BITS || four % 2) words += TILE;
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i part = parts[row][half][0];
            if (planes == 2) part = _mm512_add_epi32(_mm512_slli_epi32(part, LOW_BITS), parts[row][half][1]);
            sums[row][half] = (Ints)part;
        }
    }
}

#else

INLINE void to_units(int packing, int planes, const float *from, void *place, float unit[2]) {
    const __m256i sign = _mm256_set1_epi32(0x7fffffff);
    __m256i units[4], most = _mm256_setzero_si256(), sums = most;
    for (int each = 0; each < 4; each++)
        most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)_mm256_loadu_ps(from + each * 8), sign));
    __m128i larger = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    larger = _mm_max_epu32(larger, _mm_shuffle_epi32(larger, 0x4e));
    larger = _mm_max_epu32(larger, _mm_shuffle_epi32(larger, 0xb1));
    float inverse;
    unit[0] = unit_of(_mm_cvtsi128_si32(larger), planes, &inverse);
    for (int each = 0; each < 4; each++) {
        units[each] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(from + each * 8), _mm256_set1_ps(inverse)));
        sums = _mm256_add_epi32(sums, units[each]);
    }
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    unit[1] = unit[0] * _mm_cvtsi128_si32(sum);
    __m256i shorts[2] = {_mm256_packs_epi32(units[0], units[1]), _mm256_packs_epi32(units[2], units[3])};
    if (planes == 2) {
        /* Pairs of digits are as far apart as their word has it: four of four bits, two of eight. */
        const __m256i dealt =
            packing == FOUR_BITS
                ? _mm256_broadcastsi128_si256(_mm_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0))
                : _mm256_broadcastsi128_si256(_mm_set_epi8(15, 14, 11, 10, 13, 12, 9, 8, 7, 6, 3, 2, 5, 4, 1, 0));
        for (int half = 0; half < 2; half++) {
            __m256i ordered = _mm256_permute4x64_epi64(shorts[half], 0xd8);
            _mm256_storeu_si256((__m256i *)place + half, _mm256_shuffle_epi8(ordered, dealt));
        }
        return;
    }
    /* A word's even inputs, then its odd ones. */
    const __m256i dealt = _mm256_broadcastsi128_si256(_mm_set_epi8(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0));
    __m256i bytes = _mm256_packs_epi16(shorts[0], shorts[1]);
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
    _mm256_storeu_si256(place, _mm256_shuffle_epi8(bytes, dealt));
}

INLINE void multiply_units(
    int packing, int planes, int rows, const uint32_t *words, const uint8_t *units, int64_t stride, Ints sums[][2]
) {
    const int is_bytes = planes == 1, per_word = 32 / packing, steps_of_word = per_word / (is_bytes ? 4 : 2);
    Digits parts[NARROW_ROWS(1)][2];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++) parts[row][0] = parts[row][1] = (Digits){0};
#pragma GCC unroll 8
    for (int word = 0; word < GROUP / per_word; word++, words += TILE) {
        ask_ahead(words);
        if (LANES == 16) ask_ahead(words + LANES);
#pragma GCC unroll 4
        for (int step = 0; step < steps_of_word; step++, units += 4) {
            Digits digits[2];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                Words some = *(const Words *)(words + half * LANES);
                if (packing == EIGHT_BITS) digits[half] = WIDE(srai_epi16)(step ? (Digits)some : (Digits)(some << 8), 8);
                else digits[half] = (Digits)(some >> (4 * step) & (is_bytes ? 0x0f0f0f0f : 0x000f000f));
            }
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                int32_t inputs;
                memcpy(&inputs, units + row * stride, 4);
                Digits several = WIDE(set1_epi32)(inputs);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    Digits *part = &parts[row][half];
                    *part = is_bytes ? WIDE(add_epi16)(*part, WIDE(maddubs_epi16)(digits[half], several))
                                     : WIDE(add_epi32)(*part, WIDE(madd_epi16)(digits[half], several));
                    /* Left to itself GCC sums at the end what it multiplies here, and has not the registers for that. */
                    __asm__ volatile("" : "+v"(*part));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++)
            sums[row][half] = (Ints)(is_bytes ? WIDE(madd_epi16)(parts[row][half], WIDE(set1_epi16)(1)) : parts[row][half]);
}

#endif

#endif

#endif
