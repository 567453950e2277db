/* Products of bytes and of bf16 and the matrix unit, where the processor has them. Each file includes it for itself. */

#ifndef TIDEGATE_UNIT_H
#define TIDEGATE_UNIT_H

#include "vectors.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_DOTS_OF_BYTES 1
#else
#define HAS_DOTS_OF_BYTES 0
#endif
#if HAS_DOTS_OF_BYTES || defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_BYTES 1
#else
#define HAS_BYTES 0
#endif
#if HAS_DOTS_OF_BYTES && defined(__AVX512BF16__)
#define HAS_BF16 1
#else
#define HAS_BF16 0
#endif
#if HAS_BF16 && defined(__AMX_BF16__) && defined(__linux__)
#define HAS_MATRIX_UNIT 1
#else
#define HAS_MATRIX_UNIT 0
#endif

/* Which narrow products there are. */
enum { EXACT, FEW_ROWS, ANY_ROWS, BYTES };

#define UNIT_INPUTS 32 /* that are multiplied at once */

INLINE int64_t whole_groups(int64_t inputs) { return (inputs + UNIT_INPUTS - 1) / UNIT_INPUTS * UNIT_INPUTS; }

#if HAS_BF16

/* UNIT_INPUTS numbers as bf16; behind the row's end, zeros. */
INLINE __m512i narrowed(const float *from, int64_t left) {
    if (left >= UNIT_INPUTS) return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + LANES), (__m512)load(from));
    __m512 low = _mm512_maskz_loadu_ps(left >= LANES ? 0xffff : (1u << left) - 1, from);
    __m512 high = _mm512_maskz_loadu_ps(left <= LANES ? 0 : (1u << (left - LANES)) - 1, from + LANES);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

#endif

#if HAS_MATRIX_UNIT

/* The matrix unit multiplies tiles: 16 rows of 32 bf16, by 16 rows of 16 pairs of bf16, one input's weights for 16
 * outputs beside the next input's. Both are a kibibyte, and so are the sums, 16 rows of 16 fp32.
 */
#define UNIT_ROWS 16
#define UNIT_NUMBERS 512

/* The compiler does not know what the unit reads and writes. */
INLINE void settle(void) { __asm__ volatile("" ::: "memory"); }

/* For all tiles that this thread uses. */
INLINE void configure_unit(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((packed)) config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = UNIT_ROWS;
    settle();
    _tile_loadconfig(&config);
}

/* A row for the unit, in [tiles of rows][groups][UNIT_NUMBERS] bf16. */
INLINE void narrow_row_for_unit(const float *from, int64_t inputs, int64_t row, uint16_t *to) {
    int64_t groups = whole_groups(inputs) / UNIT_INPUTS;
    to += row / UNIT_ROWS * groups * UNIT_NUMBERS + row % UNIT_ROWS * UNIT_INPUTS;
    for (int64_t group = 0; group < groups; group++)
        _mm512_store_si512(to + group * UNIT_NUMBERS, narrowed(from + group * UNIT_INPUTS, inputs - group * UNIT_INPUTS));
}

/* Sums of one or two tiles of rows times two of weights, [32][TILE] fp32, rows `stride` apart; without `carries` they
 * begin at 0.
 */
INLINE void begin(int is_pair, int carries, const float *sums, int64_t stride) {
    settle();
    if (carries) {
        _tile_loadd(0, sums, stride * 4);
        _tile_loadd(1, sums + LANES, stride * 4);
        if (is_pair) {
            _tile_loadd(2, sums + UNIT_ROWS * stride, stride * 4);
            _tile_loadd(3, sums + UNIT_ROWS * stride + LANES, stride * 4);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

/* One group; the second tile of rows is `next` numbers behind the first. */
INLINE void multiply(int is_pair, const uint16_t *x, int64_t next, const uint16_t *weights) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + UNIT_NUMBERS, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (is_pair) {
        _tile_loadd(5, x + next, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

INLINE void end(int is_pair, float *sums, int64_t stride) {
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + LANES, stride * 4);
    if (is_pair) {
        _tile_stored(2, sums + UNIT_ROWS * stride, stride * 4);
        _tile_stored(3, sums + UNIT_ROWS * stride + LANES, stride * 4);
    }
    settle();
}

#endif

#endif
