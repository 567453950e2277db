/* Products of rows with a model's weights of four, eight and sixteen bits, with what comes before and after them: the
 * norm or SwiGLU of the rows, a bias, and the sum with what is there already.
 *
 * Two kinds. Exact ones keep rows and sums in fp32. Narrow ones round rows, and weights where that is needed, to bf16,
 * or whole numbers, and sum in fp32; they want AVX2, for bf16 AVX512-VNNI and -BF16, and are made for AMX.
 *
 * Invariants: no memory is kept between calls; an exact product's row does not depend on the other rows of a call, nor
 * on the number of threads. A narrow one's depends on whether there are enough rows for the matrix unit, no more.
 */

#include "calls.h"
#include "digits.h"

#if HAS_MATRIX_UNIT
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define PLAIN_OUTPUTS 4
#if defined(__AVX512F__)
#define PLAIN_ROWS 4
#else
#define PLAIN_ROWS 2
#endif
#define UNIT_GROUPS 9 /* whose weights are unpacked at a time, so that they and the rows stay in a core's first cache */
#define MATRIX_ROWS 12    /* from so many on the matrix unit is quicker */
#define ROWS_AT_ONCE 512  /* that are made ready before they are multiplied, so that they stay in a core's cache */
#define OWN_ROWS 128      /* of each thread, from which on it shares none with the others */

typedef struct {
    const uint32_t *words;
    const uint16_t *scales;
} Tile;

INLINE Tile tile_at(int packing, const Weight *weight, int64_t tile) {
    int64_t groups = weight->inputs / GROUP;
    return (Tile){
        (const uint32_t *)weight->numbers + tile * TILE * (weight->inputs * packing / 32),
        weight->scales + tile * groups * TILE * (packing == FOUR_BITS ? 2 : 1),
    };
}

/* What LANES outputs give to one input: the `place`-th of those in their words. */
INLINE Floats unpacked(int packing, Words words, int place, Floats scale, Floats offset) {
    if (packing == FOUR_BITS) {
#if defined(__AVX512F__)
        const __m512 digits = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        Floats digit = (Floats)_mm512_permutexvar_ps((__m512i)(words >> (4 * place)), digits);
#else
        Floats digit = __builtin_convertvector((Ints)(words >> (4 * place) & 15), Floats);
#endif
        return digit * scale + offset;
    }
    return __builtin_convertvector((Ints)(words << (24 - 8 * place)) >> 24, Floats) * scale;
}

/* A group's scales and offsets. */
INLINE void take_scales(int packing, Tile *tile, Floats scale[2], Floats offset[2]) {
    for (int half = 0; half < 2; half++) {
        scale[half] = from_fp16(tile->scales + half * LANES);
        offset[half] = packing == FOUR_BITS ? from_fp16(tile->scales + TILE + half * LANES) : (Floats){0};
    }
    tile->scales += packing == FOUR_BITS ? 2 * TILE : TILE;
}

/* A row as it is multiplied, [inputs] fp32; `made` has room for it. */
INLINE const float *ready(const Rows *rows, int64_t row, int64_t inputs, float *made) {
    const float *from = rows->numbers + row * rows->stride;
    if (rows->before == AS_THEY_ARE) return from;
    if (rows->before == NORMED) {
        norm_row(from, rows->norm, rows->epsilon, made, inputs);
        return made;
    }
    const float *ups = from + inputs;
    int64_t index = 0;
    for (; index + LANES <= inputs; index += LANES) {
        Floats gate = load(from + index);
        Floats power = exponential(-at_least(gate, -87.0f));
        store(made + index, gate / (1.0f + power) * load(ups + index));
    }
    for (; index < inputs; index++) made[index] = from[index] / (1.0f + expf(-from[index])) * ups[index];
    return made;
}

/* Where results go, beside what is the weight's. */
typedef struct {
    float *numbers;
    const float *bias;
    int64_t outputs, stride;
    int adds;
} To;

INLINE void put_one(const To *out, int64_t row, int64_t output, float sum) {
    float *to = out->numbers + row * out->stride + output;
    if (out->bias) sum += out->bias[output];
    *to = out->adds ? *to + sum : sum;
}

/* A row's sums of one tile, whose first output is `first`. */
INLINE void put(const To *out, int64_t row, int64_t first, const Floats sums[2]) {
    for (int half = 0; half < 2; half++) {
        int64_t begin = first + half * LANES;
        if (begin + LANES <= out->outputs) {
            float *to = out->numbers + row * out->stride + begin;
            Floats value = sums[half];
            if (out->bias) value += load(out->bias + begin);
            if (out->adds) value += load(to);
            store(to, value);
        } else {
            for (int64_t index = begin; index < out->outputs; index++) put_one(out, row, index, sums[half][index - begin]);
        }
    }
}

/* `rows` rows times one tile straight from its packed form. */
INLINE void few_rows(int packing, int rows, Tile tile, const float *x, int64_t stride, int64_t inputs, Floats sums[][2]) {
    const int per_word = 32 / packing;
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = (Floats){0};
    for (int64_t first = 0; first < inputs; first += GROUP) {
        Floats scale[2], offset[2];
        take_scales(packing, &tile, scale, offset);
        for (int word = 0; word < GROUP / per_word; word++, tile.words += TILE) {
            Words words[2] = {*(const Words *)tile.words, *(const Words *)(tile.words + LANES)};
            ask_ahead(tile.words);
            ask_ahead(tile.words + LANES);
#pragma GCC unroll 8
            for (int place = 0; place < per_word; place++) {
                const float *input = x + first + word * per_word + place;
                Floats low = unpacked(packing, words[0], place, scale[0], offset[0]);
                Floats high = unpacked(packing, words[1], place, scale[1], offset[1]);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++) {
                    sums[row][0] += low * input[row * stride];
                    sums[row][1] += high * input[row * stride];
                }
            }
        }
    }
}

/* One tile as fp32, [inputs][TILE]. */
INLINE void unpack(int packing, Tile tile, int64_t inputs, float *to) {
    const int per_word = 32 / packing;
    for (int64_t first = 0; first < inputs; first += GROUP) {
        Floats scale[2], offset[2];
        take_scales(packing, &tile, scale, offset);
        for (int word = 0; word < GROUP / per_word; word++, tile.words += TILE) {
#pragma GCC unroll 8
            for (int place = 0; place < per_word; place++, to += TILE) {
                for (int half = 0; half < 2; half++) {
                    Words words = *(const Words *)(tile.words + half * LANES);
                    store(to + half * LANES, unpacked(packing, words, place, scale[half], offset[half]));
                }
            }
        }
    }
}

/* One tile times all rows; `room` holds a tile as fp32. */
INLINE void packed_tile(
    int packing, const Weight *weight, int64_t tile, const float *x, int64_t stride, int64_t rows, const To *out,
    float *room
) {
    Floats sums[ROWS][2];
    int64_t inputs = weight->inputs;
    Tile place = tile_at(packing, weight, tile);
    int is_unpacked = rows > ROWS;
    if (is_unpacked) unpack(packing, place, inputs, room);
    for (int64_t row = 0; row < rows;) {
        const float *from = x + row * stride;
        int64_t count = rows - row < ROWS ? rows - row : ROWS;
#define CASE(n)                                                                      \
    case n:                                                                          \
        if (is_unpacked) many_rows(n, room, TILE, from, stride, inputs, sums);       \
        else few_rows(packing, n, place, from, stride, inputs, sums);                \
        break;
        switch (count) { FOR_EACH_COUNT(CASE) }
#undef CASE
        for (int64_t each = 0; each < count; each++) put(out, row++, tile * TILE, sums[each]);
    }
}

INLINE Floats from_16_bits(int packing, const uint16_t *from) { return packing == BF16 ? from_bf16(from) : from_fp16(from); }

INLINE float one_from_16_bits(int packing, uint16_t from) {
    uint16_t several[LANES] = {from};
    return from_16_bits(packing, several)[0];
}

/* `outputs` rows of weights, which lie as they were read, times `rows` rows. */
INLINE void plain_block(
    int packing, int outputs, int rows, const uint16_t *weights, const float *x, int64_t stride, int64_t inputs,
    const To *out, int64_t first_row, int64_t first_output
) {
    Floats sums[PLAIN_OUTPUTS][PLAIN_ROWS] = {{{0}}};
    int64_t input = 0;
    for (; input + LANES <= inputs; input += LANES) {
        Floats from[PLAIN_ROWS];
        for (int row = 0; row < rows; row++) from[row] = load(x + row * stride + input);
        for (int output = 0; output < outputs; output++) {
            Floats weight = from_16_bits(packing, weights + output * inputs + input);
            for (int row = 0; row < rows; row++) sums[output][row] += weight * from[row];
        }
    }
    for (int output = 0; output < outputs; output++) {
        for (int row = 0; row < rows; row++) {
            float sum = total(sums[output][row]);
            for (int64_t rest = input; rest < inputs; rest++)
                sum += one_from_16_bits(packing, weights[output * inputs + rest]) * x[row * stride + rest];
            put_one(out, first_row + row, first_output + output, sum);
        }
    }
}

/* TILE outputs times all rows. */
INLINE void plain_tile(
    int packing, const Weight *weight, int64_t tile, const float *x, int64_t stride, int64_t rows, const To *out
) {
    int64_t inputs = weight->inputs, end = (tile + 1) * TILE < weight->outputs ? (tile + 1) * TILE : weight->outputs;
    for (int64_t output = tile * TILE; output < end;) {
        const uint16_t *from = (const uint16_t *)weight->numbers + output * inputs;
        int64_t row = 0;
        if (output + PLAIN_OUTPUTS <= end) {
            for (; row + PLAIN_ROWS <= rows; row += PLAIN_ROWS)
                plain_block(packing, PLAIN_OUTPUTS, PLAIN_ROWS, from, x + row * stride, stride, inputs, out, row, output);
            for (; row < rows; row++)
                plain_block(packing, PLAIN_OUTPUTS, 1, from, x + row * stride, stride, inputs, out, row, output);
            output += PLAIN_OUTPUTS;
        } else {
            for (; row < rows; row++)
                plain_block(packing, 1, 1, from, x + row * stride, stride, inputs, out, row, output);
            output++;
        }
    }
}

INLINE int64_t exact_bytes(const Weight *weight, int64_t rows) { return rows * weight->inputs * sizeof(float); }

INLINE void exact_linear(int packing, const Weight *weight, const Rows *rows, const To *out, void *shared) {
    int64_t inputs = weight->inputs, tiles = (weight->outputs + TILE - 1) / TILE, count = rows->count;
    int is_made = rows->before != AS_THEY_ARE;
    float *made = shared;
    const float *x = is_made ? made : rows->numbers;
    int64_t stride = is_made ? inputs : rows->stride;
    if (is_made) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++) ready(rows, row, inputs, made + row * inputs);
    }
    int needs_room = packing < BF16 && count > ROWS;
    float *room = needs_room ? aligned_alloc(64, inputs * TILE * sizeof(float)) : NULL;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        if (packing < BF16) packed_tile(packing, weight, tile, x, stride, count, out, room);
        else plain_tile(packing, weight, tile, x, stride, count, out);
    }
    free(room);
}

#if HAS_BYTES

/* Rows as narrow products without the matrix unit take them: for weights of sixteen bits as bf16, for those of four and
 * eight as whole numbers.
 */
typedef struct {
    uint8_t *numbers;      /* [rows][width], bf16; of whole numbers [rows][groups][planes][GROUP] */
    float *units;          /* [rows][groups][2], a group's unit, and the sum of its inputs */
    int64_t width, stride; /* the inputs, filled up to whole groups with zeros; bytes from row to row */
} Narrow;

INLINE void narrow_row(int packing, int planes, const float *from, int64_t inputs, int64_t row, Narrow *to) {
    const int64_t groups = to->width / GROUP, group_bytes = to->stride / groups;
    for (int64_t group = 0; group < groups; group++) {
        void *place = to->numbers + row * to->stride + group * group_bytes;
#if HAS_BF16
        if (packing == BF16) {
            _mm512_storeu_si512(place, narrowed(from + group * GROUP, inputs - group * GROUP));
            continue;
        }
#endif
        to_units(packing, planes, from + group * GROUP, place, to->units + (row * groups + group) * 2);
    }
}

/* `rows` rows times one tile. A group's sum of digits times units is a whole number, and is scaled as such. */
INLINE void narrow_few_rows(
    int packing, int planes, int rows, Tile tile, const Narrow *x, int64_t first_row, Floats sums[][2]
) {
    const int64_t groups = x->width / GROUP;
    const uint8_t *bytes = x->numbers + first_row * x->stride;
    const float *units = x->units + first_row * groups * 2;
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = (Floats){0};
    for (int64_t group = 0; group < groups; group++, bytes += planes * GROUP, units += 2) {
        Floats scale[2], offset[2];
        Ints parts[NARROW_ROWS(1)][2];
        multiply_units(packing, planes, rows, tile.words, bytes, x->stride, parts);
        take_scales(packing, &tile, scale, offset);
        tile.words += GROUP * packing / 32 * TILE;
#pragma GCC unroll 8
        for (int row = 0; row < rows; row++) {
            float unit = units[row * groups * 2], total = units[row * groups * 2 + 1];
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                Floats part = __builtin_convertvector(parts[row][half], Floats);
                sums[row][half] += part * (scale[half] * unit);
                if (packing == FOUR_BITS) sums[row][half] += offset[half] * total;
                else if (SMALLEST_DIGIT) sums[row][half] += scale[half] * SMALLEST_DIGIT * total;
            }
        }
    }
}

#if HAS_BF16

/* `outputs` rows of bf16 weights, which lie as they were read, times `rows` rows. */
INLINE void narrow_plain_block(
    int outputs, int rows, const Weight *weight, int64_t first_output, const Narrow *x, int64_t first_row, const To *out
) {
    __m512 sums[PLAIN_OUTPUTS][PLAIN_ROWS];
    const uint16_t *weights = (const uint16_t *)weight->numbers + first_output * weight->inputs;
    for (int output = 0; output < outputs; output++)
        for (int row = 0; row < rows; row++) sums[output][row] = _mm512_setzero_ps();
    for (int64_t input = 0; input < weight->inputs; input += GROUP) {
        int64_t left = weight->inputs - input;
        __mmask32 mask = left >= GROUP ? 0xffffffff : (1u << left) - 1;
        __m512i from[PLAIN_ROWS];
        for (int row = 0; row < rows; row++)
            from[row] = _mm512_loadu_si512(x->numbers + (first_row + row) * x->stride + input * 2);
        for (int output = 0; output < outputs; output++) {
            __m512i some = _mm512_maskz_loadu_epi16(mask, weights + output * weight->inputs + input);
            for (int row = 0; row < rows; row++)
                sums[output][row] = _mm512_dpbf16_ps(sums[output][row], (__m512bh)some, (__m512bh)from[row]);
        }
    }
    for (int output = 0; output < outputs; output++)
        for (int row = 0; row < rows; row++)
            put_one(out, first_row + row, first_output + output, total((Floats)sums[output][row]));
}

/* TILE outputs of bf16 weights times all rows. */
INLINE void narrow_plain_tile(const Weight *weight, int64_t tile, const Narrow *x, int64_t rows, const To *out) {
    int64_t end = (tile + 1) * TILE < weight->outputs ? (tile + 1) * TILE : weight->outputs;
    for (int64_t output = tile * TILE; output < end;) {
        int64_t row = 0;
        if (output + PLAIN_OUTPUTS <= end) {
            for (; row + PLAIN_ROWS <= rows; row += PLAIN_ROWS)
                narrow_plain_block(PLAIN_OUTPUTS, PLAIN_ROWS, weight, output, x, row, out);
            for (; row < rows; row++) narrow_plain_block(PLAIN_OUTPUTS, 1, weight, output, x, row, out);
            output += PLAIN_OUTPUTS;
        } else {
            for (; row < rows; row++) narrow_plain_block(1, 1, weight, output, x, row, out);
            output++;
        }
    }
}

#endif

/* TILE outputs of weights of four and eight bits times all rows. */
INLINE void narrow_tile(
    int packing, int planes, const Weight *weight, int64_t tile, const Narrow *x, int64_t rows, const To *out
) {
    Tile place = tile_at(packing, weight, tile);
    for (int64_t row = 0; row < rows;) {
        Floats sums[NARROW_ROWS(1)][2];
        int64_t left = rows - row, count = left >= NARROW_ROWS(planes) ? NARROW_ROWS(planes) : left < 4 ? left : 4;
        /* What is written has a line of its own in each row, far from the last one: it is asked for before. */
        for (int64_t each = 0; each < count; each++) __builtin_prefetch(out->numbers + (row + each) * out->stride + tile * TILE, 1);
        if (count == NARROW_ROWS(planes)) narrow_few_rows(packing, planes, NARROW_ROWS(planes), place, x, row, sums);
        else if (count == 4) narrow_few_rows(packing, planes, 4, place, x, row, sums);
        else if (count == 3) narrow_few_rows(packing, planes, 3, place, x, row, sums);
        else if (count == 2) narrow_few_rows(packing, planes, 2, place, x, row, sums);
        else narrow_few_rows(packing, planes, 1, place, x, row, sums);
        for (int64_t each = 0; each < count; each++) put(out, row++, tile * TILE, sums[each]);
    }
}

/* Bytes of a row; of sixteen bits two a number, too. */
INLINE int64_t narrow_stride(const Weight *weight, int planes) {
    return whole_groups(weight->inputs) * (weight->packing == BF16 ? 2 : planes);
}

INLINE int64_t narrow_bytes(const Weight *weight, int64_t rows, int planes) {
    return rows * (narrow_stride(weight, planes) + whole_groups(weight->inputs) / GROUP * 2 * sizeof(float));
}

INLINE void narrow_linear(
    int packing, int planes, const Weight *weight, const Rows *rows, const To *out, void *shared
) {
    int64_t inputs = weight->inputs, tiles = (weight->outputs + TILE - 1) / TILE, count = rows->count;
    Narrow narrow = {.numbers = shared, .width = whole_groups(inputs), .stride = narrow_stride(weight, planes)};
    narrow.units = (float *)(narrow.numbers + count * narrow.stride);
    float *made = rows->before == AS_THEY_ARE ? NULL : malloc(inputs * sizeof(float));
#pragma omp for schedule(static)
    for (int64_t row = 0; row < count; row++) narrow_row(packing, planes, ready(rows, row, inputs, made), inputs, row, &narrow);
    free(made);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
#if HAS_BF16
        if (packing == BF16) {
            narrow_plain_tile(weight, tile, &narrow, count, out);
            continue;
        }
#endif
        narrow_tile(packing, planes, weight, tile, &narrow, count, out);
    }
}

#endif

#if HAS_MATRIX_UNIT

/* A row of 32 pairs side by side: the first vector's numbers, each before the second's. */
INLINE __m512i paired(Floats even, Floats odd) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

/* `groups` groups of one tile of a weight, from group `first` on, as the unit's tiles, [groups][2 halves][UNIT_NUMBERS].
 */
INLINE void unpack_for_unit(int packing, const Weight *weight, int64_t tile, int64_t first, int64_t groups, uint16_t *to) {
    int64_t inputs = weight->inputs;
    if (packing == BF16) {
        for (int64_t group = first; group < first + groups; group++) {
            int64_t left = inputs - group * GROUP;
            __mmask32 mask = left >= GROUP ? 0xffffffff : (1u << left) - 1;
            for (int half = 0; half < 2; half++, to += UNIT_NUMBERS) {
                Floats block[LANES];
                for (int lane = 0; lane < LANES; lane++) {
                    int64_t output = tile * TILE + half * LANES + lane;
                    const uint16_t *from = (const uint16_t *)weight->numbers + output * inputs + group * GROUP;
                    block[lane] = output < weight->outputs ? (Floats)_mm512_maskz_loadu_epi16(mask, from) : (Floats){0};
                }
                transpose(block);
                for (int lane = 0; lane < LANES; lane++) store((float *)to + lane * LANES, block[lane]);
            }
        }
        return;
    }
    const int per_word = 32 / packing, words_of_group = GROUP / per_word;
    Tile place = tile_at(packing, weight, tile);
    place.words += first * words_of_group * TILE;
    place.scales += first * (packing == FOUR_BITS ? 2 : 1) * TILE;
    for (int64_t group = 0; group < groups; group++, to += 2 * UNIT_NUMBERS) {
        Floats scale[2], offset[2];
        take_scales(packing, &place, scale, offset);
        for (int word = 0; word < words_of_group; word++, place.words += TILE) {
            for (int half = 0; half < 2; half++) {
                Words words = *(const Words *)(place.words + half * LANES);
                ask_ahead(place.words + half * LANES);
                uint16_t *row = to + half * UNIT_NUMBERS + word * per_word * LANES;
#define PAIR(digit)                                                                                       \
    if (digit < per_word)                                                                                 \
        _mm512_store_si512(row + digit * LANES,                                                           \
                           paired(unpacked(packing, words, digit, scale[half], offset[half]),             \
                                  unpacked(packing, words, digit + 1, scale[half], offset[half])));
                PAIR(0) PAIR(2) PAIR(4) PAIR(6)
#undef PAIR
            }
        }
    }
}

/* Where the sums of at most two tiles of rows are. */
typedef struct {
    float *numbers;
    int64_t stride;
    int is_pair, carries;
} Sums;

/* One tile of a weight times at most two tiles of rows: the unit multiplies a group while others are unpacked. */
INLINE void unit_pair(
    int packing, int is_pair, const Weight *weight, int64_t tile, const uint16_t *x, uint16_t *room, const Sums *sums
) {
    const int64_t groups = whole_groups(weight->inputs) / GROUP, behind = 3;
    begin(is_pair, sums->carries, sums->numbers, sums->stride);
    for (int64_t group = 0; group < groups + behind; group++) {
        if (group < groups) unpack_for_unit(packing, weight, tile, group, 1, room + group % 4 * 2 * UNIT_NUMBERS);
        settle();
        int64_t done = group - behind;
        if (done >= 0) multiply(is_pair, x + done * UNIT_NUMBERS, groups * UNIT_NUMBERS, room + done % 4 * 2 * UNIT_NUMBERS);
    }
    end(is_pair, sums->numbers, sums->stride);
}

/* `count` unpacked groups of weights times at most two tiles of rows, the second `next` numbers behind the first. The
 * weights are in a core's first cache; the rows are not, and are asked for one group ahead.
 */
INLINE void unit_groups(
    int is_pair, const uint16_t *x, int64_t next, const uint16_t *weights, int64_t count, const Sums *sums
) {
    begin(is_pair, sums->carries, sums->numbers, sums->stride);
    for (int64_t group = 0; group < count; group++, x += UNIT_NUMBERS) {
        for (int row = 0; row < UNIT_ROWS; row++) {
            const uint16_t *ahead = x + UNIT_NUMBERS + row * UNIT_INPUTS;
            __builtin_prefetch(ahead);
            if (is_pair) __builtin_prefetch(ahead + next);
        }
        multiply(is_pair, x, next, weights + 2 * group * UNIT_NUMBERS);
    }
    end(is_pair, sums->numbers, sums->stride);
}

/* Of rows from `row` on: whole tiles are summed where the result is, others beside it. */
INLINE Sums sums_of(const To *out, int64_t tile, int64_t first, int64_t row, int64_t count, float *beside) {
    int64_t several = count - row < 2 * UNIT_ROWS ? count - row : 2 * UNIT_ROWS;
    int is_whole = several % UNIT_ROWS == 0 && (tile + 1) * TILE <= out->outputs && !out->bias;
    return (Sums){
        .numbers = is_whole ? out->numbers + (first + row) * out->stride + tile * TILE : beside + row * TILE,
        .stride = is_whole ? out->stride : TILE,
        .is_pair = several > UNIT_ROWS,
        .carries = is_whole && out->adds,
    };
}

/* One tile of a weight times `count` rows, of which the first is row `first` of the result. */
INLINE void unit_tile(
    int packing, const Weight *weight, int64_t tile, const uint16_t *x, int64_t first, int64_t count, const To *out,
    uint16_t *room, float *beside
) {
    int64_t groups = whole_groups(weight->inputs) / GROUP, pieces = (groups + UNIT_GROUPS - 1) / UNIT_GROUPS;
    if (count <= 2 * UNIT_ROWS) {
        Sums sums = sums_of(out, tile, first, 0, count, beside);
        if (sums.is_pair) unit_pair(packing, 1, weight, tile, x, room, &sums);
        else unit_pair(packing, 0, weight, tile, x, room, &sums);
        pieces = 0;
    }
    for (int64_t piece = 0, done = 0; piece < pieces; piece++) {
        int64_t several = groups * (piece + 1) / pieces - done;
        unpack_for_unit(packing, weight, tile, done, several, room);
        for (int64_t row = 0; row < count; row += 2 * UNIT_ROWS) {
            const uint16_t *from = x + row * groups * GROUP + done * UNIT_NUMBERS;
            Sums sums = sums_of(out, tile, first, row, count, beside);
            if (piece) sums.carries = 1;
            if (sums.is_pair) unit_groups(1, from, groups * UNIT_NUMBERS, room, several, &sums);
            else unit_groups(0, from, 0, room, several, &sums);
        }
        done += several;
    }
    for (int64_t row = 0; row < count; row += 2 * UNIT_ROWS) {
        if (sums_of(out, tile, first, row, count, beside).numbers != beside + row * TILE) continue;
        for (int64_t each = row; each < count && each < row + 2 * UNIT_ROWS; each++) {
            Floats both[2] = {load(beside + each * TILE), load(beside + each * TILE + LANES)};
            put(out, first + each, tile * TILE, both);
        }
    }
}

/* So many rows are made ready at once, whole pairs of tiles. */
INLINE int64_t unit_rows(int64_t count) {
    return (count < ROWS_AT_ONCE ? count + 2 * UNIT_ROWS - 1 : ROWS_AT_ONCE) / (2 * UNIT_ROWS) * 2 * UNIT_ROWS;
}

INLINE int64_t unit_bytes(const Weight *weight, int64_t rows) {
    return unit_rows(rows) * whole_groups(weight->inputs) * sizeof(uint16_t);
}

/* Threads share the rows that are made ready, and the tiles; where there are rows enough, each has its own instead, and
 * waits for nobody.
 */
INLINE void unit_linear(int packing, const Weight *weight, const Rows *rows, const To *out, void *shared) {
    int64_t inputs = weight->inputs, tiles = (weight->outputs + TILE - 1) / TILE, from = 0, to = rows->count;
    int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    int shares = to < team * OWN_ROWS;
    if (!shares) {
        int64_t pairs = (to + 2 * UNIT_ROWS - 1) / (2 * UNIT_ROWS);
        from = pairs * me / team * 2 * UNIT_ROWS;
        if (me + 1 < team) to = pairs * (me + 1) / team * 2 * UNIT_ROWS;
        team = 1, me = 0;
    }
    float *made = rows->before == AS_THEY_ARE ? NULL : malloc(inputs * sizeof(float));
    uint16_t *room = aligned_alloc(64, UNIT_GROUPS * 2 * UNIT_NUMBERS * sizeof(uint16_t));
    float *beside = aligned_alloc(64, unit_rows(to - from) * TILE * sizeof(float));
    uint16_t *narrow = shares ? shared : aligned_alloc(64, unit_bytes(weight, to - from));
    configure_unit();
    for (int64_t first = from; first < to; first += ROWS_AT_ONCE) {
        int64_t several = to - first < ROWS_AT_ONCE ? to - first : ROWS_AT_ONCE;
        for (int64_t row = several * me / team; row < several * (me + 1) / team; row++)
            narrow_row_for_unit(ready(rows, first + row, inputs, made), inputs, row, narrow);
        if (shares) {
#pragma omp barrier
        }
        for (int64_t tile = tiles * me / team; tile < tiles * (me + 1) / team; tile++)
            unit_tile(packing, weight, tile, narrow, first, several, out, room, beside);
        if (shares) {
#pragma omp barrier
        }
    }
    if (!shares) {
        free(narrow);
#pragma omp barrier
    }
    _tile_release();
    free(beside);
    free(room);
    free(made);
}

#endif

/* Which kind a product is. One with weights of fp16 is exact, and so is one of bf16 without products of such. */
INLINE int kind_of(const Weight *weight, int64_t rows, int narrowness) {
    if (weight->packing == FP16 || (weight->packing == BF16 && !HAS_BF16)) return EXACT;
    if (HAS_MATRIX_UNIT && narrowness == ANY_ROWS && rows >= MATRIX_ROWS) return ANY_ROWS;
    if (!HAS_BYTES || narrowness == EXACT) return EXACT;
    if (narrowness != BYTES || weight->packing > EIGHT_BITS) return FEW_ROWS;
    return weight->packing == FOUR_BITS || HAS_DOTS_OF_BYTES ? BYTES : FEW_ROWS;
}

int64_t linear_bytes(const Weight *weight, int64_t rows, int narrowness) {
    switch (kind_of(weight, rows, narrowness)) {
#if HAS_MATRIX_UNIT
        case ANY_ROWS: return unit_bytes(weight, rows);
#endif
#if HAS_BYTES
        case FEW_ROWS: return narrow_bytes(weight, rows, 2);
        case BYTES: return narrow_bytes(weight, rows, 1);
#endif
        default: return exact_bytes(weight, rows);
    }
}

typedef void (*Product)(const Weight *, const Rows *, const To *, void *);

/* Each in a function of its own: in one the compiler takes several times as long. */
#define PRODUCT(name, function, ...)                                                                   \
    static OUTLINED void name(const Weight *weight, const Rows *rows, const To *out, void *shared) {   \
        function(__VA_ARGS__, weight, rows, out, shared);                                              \
    }
PRODUCT(exact_four, exact_linear, FOUR_BITS)
PRODUCT(exact_eight, exact_linear, EIGHT_BITS)
PRODUCT(exact_bf16, exact_linear, BF16)
PRODUCT(exact_fp16, exact_linear, FP16)
#if HAS_BYTES
PRODUCT(narrow_four, narrow_linear, FOUR_BITS, 2)
PRODUCT(narrow_eight, narrow_linear, EIGHT_BITS, 2)
PRODUCT(bytes_four, narrow_linear, FOUR_BITS, 1)
#endif
#if HAS_DOTS_OF_BYTES
PRODUCT(bytes_eight, narrow_linear, EIGHT_BITS, 1)
#else
#define bytes_eight NULL
#endif
#if HAS_BF16
PRODUCT(narrow_bf16, narrow_linear, BF16, 2)
#else
#define narrow_bf16 NULL
#endif
#if HAS_MATRIX_UNIT
PRODUCT(unit_four, unit_linear, FOUR_BITS)
PRODUCT(unit_eight, unit_linear, EIGHT_BITS)
PRODUCT(unit_bf16, unit_linear, BF16)
#endif

/* out [rows, outputs] = rows times a weight transposed, + bias, + what is there where it `adds`. Inputs of four and
 * eight bits are whole groups; strides count numbers.
 */
void linear(const Weight *weight, const Rows *rows, const Out *out, int narrowness, void *shared) {
    static const Product products[][4] = {
        [EXACT] = {exact_four, exact_eight, exact_bf16, exact_fp16},
#if HAS_BYTES
        [FEW_ROWS] = {narrow_four, narrow_eight, narrow_bf16},
        [BYTES] = {bytes_four, bytes_eight},
#endif
#if HAS_MATRIX_UNIT
        [ANY_ROWS] = {unit_four, unit_eight, unit_bf16},
#endif
    };
    To to = {out->numbers, weight->bias, weight->outputs, out->stride, out->adds};
    int place = weight->packing == FOUR_BITS ? 0 : weight->packing == EIGHT_BITS ? 1 : weight->packing == BF16 ? 2 : 3;
    products[kind_of(weight, rows->count, narrowness)][place](weight, rows, &to, shared);
}

void tidegate_linear(const Weight *weight, const Rows *rows, const Out *out, int narrowness, int threads) {
    void *shared = shared_memory(linear_bytes(weight, rows->count, narrowness));
#pragma omp parallel num_threads(threads)
    linear(weight, rows, out, narrowness, shared);
    free(shared);
}

/* EXACT where narrow products would be exact ones, FEW_ROWS where there is no matrix unit, else ANY_ROWS. The system
 * gives a process the matrix unit when it asks for it.
 */
int64_t tidegate_narrowness(void) {
#if HAS_MATRIX_UNIT
    enum { ASK = 0x1023, TILE_DATA = 18 };
    if (syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0) return ANY_ROWS;
#endif
    return HAS_BYTES ? FEW_ROWS : EXACT;
}

int64_t tidegate_tile(void) { return TILE; }
