/* Rotary positions with the write into the KV cache, and attention over KV blocks where they lie.
 *
 * Invariants: no memory is kept between calls; what comes out for a row does not depend on the other rows of a call,
 * nor on the number of threads.
 */

#include "calls.h"
#include "unit.h"

#include <omp.h>

/* Turn the query and key heads of rows [rows, (heads + 2 kv_heads) * key_size] in place, each normed before where the
 * model has weights for it, and write keys and values into the cache at the rows' slots. A team's.
 */
void rotate_and_write(
    const CacheLayout *layout, const Places *places, float *qkv, int64_t stride, int64_t rows, int64_t heads,
    const float *norms, float epsilon, void *cache
) {
    int64_t size = layout->key_size, half = size / 2, cached = layout->token_size;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        float *of_row = qkv + row * stride;
        const float *cosine = places->cosines + places->positions[row] * half;
        const float *sine = places->sines + places->positions[row] * half;
        for (int64_t head = 0; head < heads + layout->kv_heads; head++) {
            float *first = of_row + head * size, *second = first + half;
            if (norms) norm_row(first, norms + head * size, epsilon, first, size);
            for (int64_t index = 0; index < half; index++) {
                float a = first[index], b = second[index];
                first[index] = a * cosine[index] - b * sine[index];
                second[index] = b * cosine[index] + a * sine[index];
            }
        }
        const float *kept = of_row + heads * size;
        if (layout->is_bf16) {
            uint16_t *to = (uint16_t *)cache + places->slots[row] * cached;
            for (int64_t index = 0; index < cached; index++) to[index] = to_bf16(kept[index]);
        } else {
            memcpy((float *)cache + places->slots[row] * cached, kept, cached * sizeof(float));
        }
    }
}

void tidegate_rotate_and_write(
    const CacheLayout *layout, const Places *places, float *qkv, int64_t stride, int64_t rows, int64_t heads,
    const float *norms, float epsilon, void *cache, int threads
) {
#pragma omp parallel num_threads(threads) if (rows * stride > WORTH_THREADS)
    rotate_and_write(layout, places, qkv, stride, rows, heads, norms, epsilon, cache);
}

INLINE Floats cached(int is_bf16, const void *cache, int64_t offset) {
    return is_bf16 ? from_bf16((const uint16_t *)cache + offset) : load((const float *)cache + offset);
}

#define SPLIT 256 /* tokens of a context that one thread takes at a time */
#define QUERIES 4 /* heads that share what is read of a key or value */
#define HELD 4    /* vectors of a query that stay in registers */
#define AHEAD 8   /* tokens for which keys and values are asked for before they are needed */
#define WIDE 4    /* vectors of a value that are summed in registers */

/* The totals of LANES vectors, one in each lane. `sums` is overwritten. */
INLINE Floats totals(Floats sums[LANES]) {
    /* Each step adds the halves of every part, and puts what is left of two vectors side by side. */
#define MERGE(count, low, high)                                                              \
    for (int index = 0; index < count; index++)                                              \
        sums[index] = low(sums[2 * index], sums[2 * index + 1]) + high(sums[2 * index], sums[2 * index + 1]);
#if LANES == 16
#define LOW8(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
#define HIGH8(a, b) __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define LOW4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define HIGH4(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#define LOW2(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
#define HIGH2(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31)
#define LOW1(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define HIGH1(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
    MERGE(8, LOW8, HIGH8)
    MERGE(4, LOW4, HIGH4)
    MERGE(2, LOW2, HIGH2)
#else
#define LOW4(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define HIGH4(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#define LOW2(a, b) __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13)
#define HIGH2(a, b) __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15)
#define LOW1(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define HIGH1(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
    MERGE(4, LOW4, HIGH4)
    MERGE(2, LOW2, HIGH2)
#endif
    MERGE(1, LOW1, HIGH1)
    return sums[0];
}

/* Scores of the tokens at `count` offsets, which are filled up to whole LANES, for `queries` heads: [QUERIES][SPLIT]. A
 * key is `parts` vectors; of HELD ones the queries stay in registers. Keys and values, `shift` behind them, lie too far
 * apart for the processor to see what comes next, so they are asked for ahead.
 */
INLINE void score(
    int is_bf16, int queries, int64_t parts, int64_t shift, const void *cache, const int64_t *offsets, int64_t count, int64_t key_size,
    const float *query, float scale, float (*scores)[SPLIT]
) {
    Floats held[QUERIES][HELD];
    if (parts == HELD)
        for (int q = 0; q < queries; q++)
            for (int part = 0; part < HELD; part++) held[q][part] = load(query + q * key_size + part * LANES);
    for (int64_t first = 0; first < count; first += LANES) {
        Floats sums[QUERIES][LANES];
        for (int token = 0; token < LANES; token++) {
            Floats of_token[QUERIES] = {{0}};
            int64_t offset = offsets[first + token];
            if (first + token + AHEAD < count) {
                const char *ahead = (const char *)cache + offsets[first + token + AHEAD] * (is_bf16 ? 2 : 4);
                for (int line = 0; line < HELD; line++) __builtin_prefetch(ahead + line * 64);
                ahead += shift * (is_bf16 ? 2 : 4);
                for (int line = 0; line < HELD; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
            }
            for (int64_t part = 0; part < parts; part++) {
                Floats key = cached(is_bf16, cache, offset + part * LANES);
                for (int q = 0; q < queries; q++)
                    of_token[q] += key * (parts == HELD ? held[q][part] : load(query + q * key_size + part * LANES));
            }
            for (int q = 0; q < queries; q++) sums[q][token] = of_token[q];
        }
        for (int q = 0; q < queries; q++) store(scores[q] + first, totals(sums[q]) * scale);
    }
}

/* Weights from scores, in place; gives the largest score, of those `before` too, and the sum of the weights. */
INLINE void soften(float *scores, int64_t count, float before, float *largest, float *sum) {
    float most = before;
    int64_t token = 0;
    if (count >= LANES) {
        Floats each = load(scores);
        for (token = LANES; token + LANES <= count; token += LANES) each = larger(load(scores + token), each);
        for (int lane = 0; lane < LANES; lane++) most = each[lane] <= most ? most : each[lane];
    }
    for (; token < count; token++) most = scores[token] <= most ? most : scores[token];
    Floats sums = {0};
    token = 0;
    for (; token + LANES <= count; token += LANES) {
        Floats weights = exponential(load(scores + token) - most);
        store(scores + token, weights);
        sums += weights;
    }
    *sum = total(sums);
    for (; token < count; token++) {
        scores[token] = expf(scores[token] - most);
        *sum += scores[token];
    }
    *largest = most;
}

/* Sums of `width` vectors of values, `shift` behind the offsets, weighted, for `queries` heads. */
INLINE void weigh(
    int is_bf16, int queries, int width, const void *cache, const int64_t *offsets, int64_t shift, int64_t count,
    float (*weights)[SPLIT], float *out, int64_t out_stride
) {
    Floats sums[QUERIES][WIDE] = {{{0}}};
    for (int64_t token = 0; token < count; token++) {
        for (int part = 0; part < width; part++) {
            Floats value = cached(is_bf16, cache, offsets[token] + shift + part * LANES);
            for (int q = 0; q < queries; q++) sums[q][part] += value * weights[q][token];
        }
    }
    for (int q = 0; q < queries; q++)
        for (int part = 0; part < width; part++) store(out + q * out_stride + part * LANES, sums[q][part]);
}

/* What `queries` heads get of `count` tokens, whose keys are at the offsets and values `shift` behind them. What is
 * scored beyond `count`, to fill up the last vector, is not used.
 */
INLINE void attend_split(
    int is_bf16, int queries, const void *cache, const int64_t *offsets, int64_t count, int64_t shift,
    int64_t key_size, int64_t value_size, const float *query, float scale, float *partial
) {
    float scores[QUERIES][SPLIT];
    if (key_size == HELD * LANES) score(is_bf16, queries, HELD, shift, cache, offsets, count, key_size, query, scale, scores);
    else score(is_bf16, queries, key_size / LANES, shift, cache, offsets, count, key_size, query, scale, scores);
    for (int q = 0; q < queries; q++)
        soften(scores[q], count, -INFINITY, partial + q * (value_size + 2), partial + q * (value_size + 2) + 1);
    float *out = partial + 2;
    int64_t part = 0, stride = value_size + 2;
    for (; part + WIDE * LANES <= value_size; part += WIDE * LANES)
        weigh(is_bf16, queries, WIDE, cache, offsets, shift + part, count, scores, out + part, stride);
    for (; part < value_size; part += LANES)
        weigh(is_bf16, queries, 1, cache, offsets, shift + part, count, scores, out + part, stride);
}

/* Where the keys of `count` tokens of a sequence lie, from token `first` on, `inside` their tokens, when behind the
 * first `sinks` tokens `hidden` ones are not counted. The offsets are filled up to whole LANES with the last.
 */
INLINE void find(
    const CacheLayout *layout, const int64_t *blocks, int64_t inside, int64_t first, int64_t count, int64_t sinks,
    int64_t hidden, int64_t *offsets
) {
    int64_t block_tokens = layout->block_tokens, from = first < sinks ? first : first + hidden;
    int64_t block = from / block_tokens, place = from % block_tokens, token = 0;
    for (; token < count; token++) {
        if (first + token == sinks) block = (sinks + hidden) / block_tokens, place = (sinks + hidden) % block_tokens;
        offsets[token] = (blocks[block] * block_tokens + place) * layout->token_size + inside;
        if (++place == block_tokens) place = 0, block++;
    }
    for (; token % LANES; token++) offsets[token] = offsets[count - 1];
}

INLINE int64_t shift_of(const CacheLayout *layout, int64_t kv_head) {
    return layout->values_at + kv_head * (layout->value_size - layout->key_size);
}

/* Attention of one row a sequence, [sequences, heads, key_size]. key_size and value_size are multiples of LANES. Long
 * contexts are cut into splits, so that a single sequence keeps all threads busy; what is shared holds a largest
 * score, a sum and a value for each head and split.
 */
INLINE void attend_rows_apart(
    int is_bf16, const CacheLayout *layout, const Window *window, const Group *group, const float *queries,
    int64_t stride, int64_t heads, const void *cache, float *out, void *shared
) {
    int64_t kv_heads = layout->kv_heads, key_size = layout->key_size, value_size = layout->value_size;
    int64_t sharing = heads / kv_heads, parts = (sharing + QUERIES - 1) / QUERIES, size = value_size + 2;
    int64_t splits = (group->longest + SPLIT - 1) / SPLIT;
    float *partials = shared;
#pragma omp for collapse(4) schedule(dynamic, 4)
    for (int64_t sequence = 0; sequence < group->count; sequence++)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int64_t part = 0; part < parts; part++)
                for (int64_t split = 0; split < splits; split++) {
                    int64_t first = split * SPLIT, left = group->lengths[sequence] - first;
                    if (left <= 0) continue;
                    int64_t head = kv_head * sharing + part * QUERIES;
                    int64_t taken = sharing - part * QUERIES < QUERIES ? sharing - part * QUERIES : QUERIES;
                    const float *query = queries + sequence * stride + head * key_size;
                    /* [sequences, splits, heads, size] */
                    float *partial = partials + ((sequence * splits + split) * heads + head) * size;
                    int64_t count = left < SPLIT ? left : SPLIT, offsets[SPLIT], shift = shift_of(layout, kv_head);
                    find(layout, group->blocks + sequence * group->blocks_stride, kv_head * key_size, first, count,
                         window->sinks, group->hidden ? group->hidden[sequence] : 0, offsets);
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        attend_split(is_bf16, n, cache, offsets, count, shift, key_size, value_size, query, layout->scale, partial);   \
        break;
                    switch (taken) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef CASE
                }
#pragma omp for collapse(2) schedule(static)
    for (int64_t sequence = 0; sequence < group->count; sequence++)
        for (int64_t head = 0; head < heads; head++) {
            float *to = out + (sequence * heads + head) * value_size, most = -INFINITY, sum = 0;
            int64_t used = (group->lengths[sequence] + SPLIT - 1) / SPLIT;
            const float *from = partials + (sequence * splits * heads + head) * size;
            for (int64_t split = 0; split < used; split++) {
                float largest = from[split * heads * size];
                if (!(largest <= most)) most = largest;
            }
            memset(to, 0, value_size * sizeof(float));
            for (int64_t split = 0; split < used; split++) {
                const float *partial = from + split * heads * size;
                float weight = expf(partial[0] - most);
                sum += weight * partial[1];
                for (int64_t index = 0; index < value_size; index++) to[index] += weight * partial[2 + index];
            }
            for (int64_t index = 0; index < value_size; index++) to[index] /= sum;
        }
}

#define CHUNK_ROWS 64    /* tokens of a prompt that one thread takes at a time */
#define CHUNK_SPLIT 128  /* tokens of its context whose keys and values are laid out for them */

/* Of a split's tokens, a row sees those before `sinks`, and from `newest` up to `end`. */
typedef struct {
    int64_t sinks, newest, end;
} Seen;

INLINE int64_t first_of_newest(const Window *window, int64_t position) {
    return position < window->begins_at ? 0 : position - window->newest + 1;
}

/* What a row sees of `count` tokens from `first` on. */
INLINE Seen seen_of_split(const Window *window, int64_t position, int64_t first, int64_t count) {
    int64_t end = position + 1 - first < count ? position + 1 - first : count;
    int64_t sinks = window->sinks > first ? window->sinks - first : 0;
    int64_t newest = first_of_newest(window, position) - first;
    if (newest < end) return (Seen){sinks, newest, end};
    end = sinks < end ? sinks : end;
    return (Seen){end, end, end};
}

/* How many of `count` tokens from `first` on matter to a row and to those behind it. */
INLINE int64_t needed_of_split(const Window *window, int64_t position, int64_t first, int64_t count) {
    if (first + count > first_of_newest(window, position)) return count;
    int64_t sinks = window->sinks > first ? window->sinks - first : 0;
    return sinks < count ? sinks : count;
}

/* Keys as [key_size][CHUNK_SPLIT], values as [CHUNK_SPLIT][width], from whole LANES of offsets. */
INLINE void lay_out(
    int is_bf16, const void *cache, const int64_t *offsets, int64_t count, int64_t shift, int64_t key_size,
    int64_t value_size, int64_t width, float *keys, float *values
) {
    for (int64_t first = 0; first < count; first += LANES) {
        for (int64_t index = 0; index < key_size; index += LANES) {
            Floats block[LANES];
            for (int token = 0; token < LANES; token++)
                block[token] = cached(is_bf16, cache, offsets[first + token] + index);
            transpose(block);
            for (int lane = 0; lane < LANES; lane++) store(keys + (index + lane) * CHUNK_SPLIT + first, block[lane]);
        }
    }
    for (int64_t token = 0; token < count; token++)
        for (int64_t index = 0; index < value_size; index += LANES)
            store(values + token * width + index, cached(is_bf16, cache, offsets[token] + shift + index));
}

/* `many_rows`, or where all is in bf16 the same of pairs: `inputs` of them, each as long as a number of fp32. */
INLINE void many(
    int is_narrow, int rows, const float *weights, int64_t step, const float *x, int64_t stride, int64_t inputs,
    Floats sums[][2]
) {
#if HAS_BF16
    if (is_narrow) {
        for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = (Floats){0};
#pragma GCC unroll 2
        for (int64_t input = 0; input < inputs; input++, weights += step) {
            __m512bh low = (__m512bh)load(weights), high = (__m512bh)load(weights + LANES);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++) {
                __m512bh pair = (__m512bh)_mm512_set1_ps(x[row * stride + input]);
                sums[row][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][0], low, pair);
                sums[row][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][1], high, pair);
            }
        }
        return;
    }
#endif
    many_rows(rows, weights, step, x, stride, inputs, sums);
}

#if HAS_BF16

/* As `lay_out`, of pairs: keys as [key_size / 2][CHUNK_SPLIT], two numbers of a token each, values as
 * [CHUNK_SPLIT / 2][width], two tokens' each.
 */
INLINE void lay_out_pairs(
    const uint16_t *cache, const int64_t *offsets, int64_t count, int64_t shift, int64_t key_size, int64_t value_size,
    int64_t width, float *keys, float *values
) {
    for (int64_t first = 0; first < count; first += LANES)
        for (int64_t index = 0; index < key_size; index += 2 * LANES) {
            Floats block[LANES];
            for (int token = 0; token < LANES; token++)
                block[token] = load((const float *)(cache + offsets[first + token] + index));
            transpose(block);
            for (int lane = 0; lane < LANES; lane++) store(keys + (index / 2 + lane) * CHUNK_SPLIT + first, block[lane]);
        }
    for (int64_t token = 0; token < count; token += 2)
        for (int64_t index = 0; index < value_size; index += LANES) {
            const uint16_t *one = cache + offsets[token] + shift + index;
            /* Behind the last token, its own values: they weigh nothing. */
            const uint16_t *other = token + 1 < count ? cache + offsets[token + 1] + shift + index : one;
            Words low = __builtin_convertvector(*(const Halves *)one, Words);
            Words high = __builtin_convertvector(*(const Halves *)other, Words);
            store(values + token / 2 * width + index, (Floats)(low | high << 16));
        }
}

#endif

/* What `rows` consecutive rows of one head, the first of which is token `position`, get of the laid out tokens, which
 * are those from `split` on. `largest`, `sums` and `out` carry on from split to split.
 */
INLINE void attend_rows(
    int is_narrow, int rows, const float *keys, const float *values, int64_t width, const Window *window,
    int64_t position, int64_t split, int64_t count, const float *query, int64_t query_stride, int64_t key_size, int64_t value_size, float scale,
    float *largest, float *sums, float *out, int64_t out_stride
) {
    float weights[ROWS][CHUNK_SPLIT];
    for (int64_t first = 0; first < count; first += TILE) {
        Floats scores[ROWS][2];
        many(is_narrow, rows, keys + first, CHUNK_SPLIT, query, query_stride, is_narrow ? key_size / 2 : key_size, scores);
        for (int row = 0; row < rows; row++)
            for (int half = 0; half < 2; half++)
                store(weights[row] + first + half * LANES, scores[row][half] * scale);
    }
    float shrink[ROWS];
    for (int row = 0; row < rows; row++) {
        Seen seen = seen_of_split(window, position + row, split, count);
        shrink[row] = 1;
        if (seen.end > 0) {
            float most, sum, before = largest[row];
            for (int64_t token = seen.sinks; token < seen.newest; token++) weights[row][token] = -INFINITY;
            soften(weights[row], seen.end, before, &most, &sum);
            for (int64_t token = seen.sinks; token < seen.newest; token++) weights[row][token] = 0;
            shrink[row] = before == -INFINITY ? 0 : expf(before - most);
            largest[row] = most;
            sums[row] = sums[row] * shrink[row] + sum;
        }
        for (int64_t token = seen.end < 0 ? 0 : seen.end; token < count; token++) weights[row][token] = 0;
#if HAS_BF16
        /* In place: what is written lies behind what is still to be read. */
        if (is_narrow && count % 2) weights[row][count] = 0;
        for (int64_t token = 0; is_narrow && token < count; token += 2 * LANES)
            _mm512_storeu_si512(weights[row] + token / 2, narrowed(weights[row] + token, 2 * LANES));
#endif
    }
    int64_t inputs = is_narrow ? (count + 1) / 2 : count;
    for (int64_t first = 0; first < value_size; first += TILE) {
        Floats added[ROWS][2];
        many(is_narrow, rows, values + first, width, weights[0], CHUNK_SPLIT, inputs, added);
        for (int row = 0; row < rows; row++) {
            for (int half = 0; half < 2 && first + half * LANES < value_size; half++) {
                float *to = out + row * out_stride + first + half * LANES;
                store(to, load(to) * shrink[row] + added[row][half]);
            }
        }
    }
}

/* Attention of one sequence's consecutive rows, [rows, heads, key_size]; `is_narrow` rounds queries and weights to bf16,
 * for a cache in it, and wants key sizes of whole groups for the unit.
 */
INLINE void attend_rows_together(
    int is_narrow, const CacheLayout *layout, const Window *window, const Group *group, const float *queries,
    int64_t stride, int64_t heads, const void *cache, float *out, void *shared
) {
    int64_t kv_heads = layout->kv_heads, key_size = layout->key_size, value_size = layout->value_size;
    int64_t sharing = heads / kv_heads, width = (value_size + TILE - 1) / TILE * TILE, out_stride = heads * value_size;
    int64_t rows = group->count, start = group->longest - rows, most = CHUNK_ROWS, parts;
    /* So many at a time that threads have as much to do, or nearly; each part reads the whole context. */
    const int64_t threads = omp_get_num_threads();
    for (; parts = (rows + most - 1) / most, most > ROWS; most /= 2)
        if (parts * kv_heads % threads == 0 || parts * kv_heads >= 2 * threads) break;
    float *keys = aligned_alloc(64, key_size * CHUNK_SPLIT * sizeof(float));
    float *values = aligned_alloc(64, width * CHUNK_SPLIT * sizeof(float));
    float *largest = malloc(sharing * CHUNK_ROWS * sizeof(float));
    float *sums = malloc(sharing * CHUNK_ROWS * sizeof(float));
    int64_t query_size = key_size / 2; /* in pairs */
    float *pairs = is_narrow ? malloc(sharing * CHUNK_ROWS * query_size * sizeof(float)) : NULL;
    memset(values, 0, width * CHUNK_SPLIT * sizeof(float));
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++) {
            int64_t begin = part * most, end = begin + most < rows ? begin + most : rows;
            int64_t shift = shift_of(layout, kv_head);
            for (int64_t index = 0; index < sharing * CHUNK_ROWS; index++) largest[index] = -INFINITY, sums[index] = 0;
            for (int64_t row = begin; row < end; row++)
                memset(out + row * out_stride + kv_head * sharing * value_size, 0, sharing * value_size * sizeof(float));
#if HAS_BF16
            for (int64_t index = 0; is_narrow && index < sharing * (end - begin); index++) {
                int64_t head = index / (end - begin), row = begin + index % (end - begin);
                const float *from = queries + row * stride + (kv_head * sharing + head) * key_size;
                float *to = pairs + (head * CHUNK_ROWS + row - begin) * query_size;
                for (int64_t number = 0; number < key_size; number += UNIT_INPUTS)
                    _mm512_storeu_si512(to + number / 2, narrowed(from + number, UNIT_INPUTS));
            }
#endif
            for (int64_t first = 0; first < start + end; first += CHUNK_SPLIT) {
                int64_t left = start + end - first, count = left < CHUNK_SPLIT ? left : CHUNK_SPLIT;
                count = needed_of_split(window, start + begin, first, count);
                if (!count) continue;
                int64_t offsets[CHUNK_SPLIT];
                find(layout, group->blocks, kv_head * key_size, first, count, 0, 0, offsets);
#if HAS_BF16
                if (is_narrow) lay_out_pairs(cache, offsets, count, shift, key_size, value_size, width, keys, values);
                else
#endif
                if (layout->is_bf16) lay_out(1, cache, offsets, count, shift, key_size, value_size, width, keys, values);
                else lay_out(0, cache, offsets, count, shift, key_size, value_size, width, keys, values);
                for (int64_t head = 0; head < sharing; head++) {
                    for (int64_t row = begin; row < end; row += ROWS) {
                        int64_t several = end - row < ROWS ? end - row : ROWS;
                        if (!needed_of_split(window, start + row, first, count)) continue;
                        int64_t of_all = kv_head * sharing + head, state = head * CHUNK_ROWS + row - begin;
                        const float *query = queries + row * stride + of_all * key_size;
                        if (is_narrow) query = pairs + state * query_size;
#define CASE(n)                                                                                                   \
    case n:                                                                                                       \
        attend_rows(is_narrow, n, keys, values, width, window, start + row, first, count, query,                  \
                    is_narrow ? query_size : stride, key_size, value_size, layout->scale, largest + state,        \
                    sums + state, out + row * out_stride + of_all * value_size, out_stride);                      \
        break;
                        switch (several) { FOR_EACH_COUNT(CASE) }
#undef CASE
                    }
                }
            }
            for (int64_t head = 0; head < sharing; head++) {
                for (int64_t row = begin; row < end; row++) {
                    float *to = out + row * out_stride + (kv_head * sharing + head) * value_size;
                    float sum = sums[head * CHUNK_ROWS + row - begin];
                    for (int64_t index = 0; index < value_size; index++) to[index] /= sum;
                }
            }
        }
    free(keys);
    free(values);
    free(largest);
    free(sums);
    free(pairs);
}

/* Each in a function of its own: in one the compiler takes several times as long. */
#define ATTENTION(name, function, kind)                                                                             \
    static OUTLINED void name(                                                                                      \
        const CacheLayout *layout, const Window *window, const Group *group, const float *queries, int64_t stride,  \
        int64_t heads, const void *cache, float *out, void *shared                                                  \
    ) {                                                                                                             \
        function(kind, layout, window, group, queries, stride, heads, cache, out, shared);                          \
    }
ATTENTION(rows_apart_in_fp32, attend_rows_apart, 0)
ATTENTION(rows_apart_in_bf16, attend_rows_apart, 1)
ATTENTION(attend_chunk, attend_rows_together, 0)
#if HAS_BF16
ATTENTION(attend_chunk_in_bf16, attend_rows_together, 1)
#endif

#if HAS_MATRIX_UNIT

#define UNIT_SPLIT 256 /* tokens of a context whose keys and values are laid out at a time */
#define UNIT_HEADS 8   /* heads that share them */

/* What a thread works with. */
typedef struct {
    uint16_t *keys;    /* [pairs of token tiles][groups of a key][2][UNIT_NUMBERS] */
    uint16_t *values;  /* [pairs of value tiles][groups of tokens][2][UNIT_NUMBERS] */
    uint16_t *queries; /* of each head [CHUNK_ROWS / UNIT_ROWS][groups of a key][UNIT_NUMBERS] */
    uint16_t *weights; /* [2 tiles of rows][groups of tokens][UNIT_NUMBERS] */
    float *scores;     /* [groups of tokens][32][TILE] */
    float *largest, *sums; /* of each head's rows */
} UnitRoom;

/* Keys and values of `count` tokens, a multiple of UNIT_INPUTS, as the unit's tiles. */
INLINE void lay_out_for_unit(
    const uint16_t *cache, const int64_t *offsets, int64_t count, int64_t shift, int64_t key_size, int64_t value_size,
    const UnitRoom *room
) {
    int64_t key_groups = key_size / UNIT_INPUTS, token_groups = count / UNIT_INPUTS;
    for (int64_t token = 0; token < count; token += UNIT_ROWS) {
        uint16_t *to = room->keys + (token / TILE * key_groups * 2 + token / UNIT_ROWS % 2) * UNIT_NUMBERS;
        for (int64_t group = 0; group < key_groups; group++) {
            Floats block[LANES];
            for (int lane = 0; lane < LANES; lane++)
                block[lane] = load((const float *)(cache + offsets[token + lane] + group * UNIT_INPUTS));
            transpose(block);
            for (int lane = 0; lane < LANES; lane++)
                store((float *)(to + group * 2 * UNIT_NUMBERS) + lane * LANES, block[lane]);
        }
    }
    for (int64_t token = 0; token < count; token += 2) {
        const uint16_t *even = cache + offsets[token] + shift, *odd = cache + offsets[token + 1] + shift;
        int64_t group = token / UNIT_INPUTS, row = token % UNIT_INPUTS / 2;
        for (int64_t index = 0; index < value_size; index += LANES) {
            int64_t tile = (index / TILE * token_groups + group) * 2 + index / LANES % 2;
            Words low = __builtin_convertvector(*(const Halves *)(even + index), Words);
            Words high = __builtin_convertvector(*(const Halves *)(odd + index), Words) << 16;
            store((float *)(room->values + tile * UNIT_NUMBERS) + row * LANES, (Floats)(low | high));
        }
    }
}

/* 2 to the power of each lane, to one part in 10,000, which is nearer than bf16 is. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(0.05508868f), rest, _mm512_set1_ps(0.24260405f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69327624f));
    return _mm512_scalef_ps(_mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.99992894f)), whole);
}

/* The first `count` lanes, none of a negative count. */
INLINE __mmask16 lanes_below(int64_t count) { return count >= LANES ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

/* Which lanes a row sees, of those from `token` on: for most, all of them. */
INLINE __mmask16 seen_lanes(Seen seen, int64_t token) {
    if (token + LANES <= (seen.newest <= seen.sinks ? seen.end : seen.sinks)) return 0xffff;
    return lanes_below(seen.end - token) & (lanes_below(seen.sinks - token) | ~lanes_below(seen.newest - token));
}

/* A row's scores become its weights, relative to the largest yet; their sum comes back. Of `count` tokens, those that
 * are not seen get none.
 */
INLINE float weigh_row(const UnitRoom *room, int64_t row, Seen seen, int64_t count, float scale, float *largest) {
    const float *scores = room->scores + row * TILE;
    const int64_t token_groups = count / UNIT_INPUTS;
    uint16_t *to = room->weights + row / UNIT_ROWS * token_groups * UNIT_NUMBERS + row % UNIT_ROWS * UNIT_INPUTS;
    __m512 most = _mm512_set1_ps(*largest), sums = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int64_t token = 0; token < seen.end; token += LANES) {
        __m512 some = _mm512_loadu_ps(scores + token / TILE * 2 * UNIT_ROWS * TILE + token % TILE);
        most = _mm512_mask_max_ps(most, seen_lanes(seen, token), _mm512_mul_ps(some, factor), most);
    }
    *largest = _mm512_reduce_max_ps(most);
    most = _mm512_set1_ps(*largest);
    for (int64_t group = 0; group < token_groups; group++, to += UNIT_NUMBERS, scores += 2 * UNIT_ROWS * TILE) {
        __m512 halves[2];
        for (int half = 0; half < 2; half++) {
            __mmask16 lanes = seen_lanes(seen, group * UNIT_INPUTS + half * LANES);
            __m512 power = _mm512_fmsub_ps(_mm512_loadu_ps(scores + half * LANES), factor, most);
            halves[half] = _mm512_maskz_mov_ps(lanes, power_of_two(power));
            sums = _mm512_add_ps(sums, halves[half]);
        }
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]));
    }
    return _mm512_reduce_add_ps(sums);
}

/* What at most two tiles of rows of one head, the first of which is token `position`, get of the laid out tokens, which
 * are those from `split` on. `largest`, `sums` and `out` carry on from split to split.
 */
INLINE void attend_unit_rows(
    int is_pair, int64_t rows, const UnitRoom *room, const uint16_t *queries, const Window *window, int64_t position,
    int64_t split, int64_t count, int64_t key_size, int64_t value_size, float scale, float *largest, float *sums,
    float *out, int64_t out_stride
) {
    int64_t key_groups = key_size / UNIT_INPUTS, token_groups = count / UNIT_INPUTS, seen = position + 1 - split;
    int64_t used = seen + rows - 1 < count ? (seen + rows - 1 + UNIT_INPUTS - 1) / UNIT_INPUTS : token_groups;
    for (int64_t some = 0; some < used; some++) {
        begin(is_pair, 0, NULL, 0);
        for (int64_t group = 0; group < key_groups; group++)
            multiply(is_pair, queries + group * UNIT_NUMBERS, key_groups * UNIT_NUMBERS,
                     room->keys + (some * key_groups + group) * 2 * UNIT_NUMBERS);
        end(is_pair, room->scores + some * 2 * UNIT_ROWS * TILE, TILE);
    }
    float shrink[2 * UNIT_ROWS];
    for (int64_t row = 0; row < rows; row++) {
        Seen of_row = seen_of_split(window, position + row, split, count);
        float before = largest[row];
        float sum = weigh_row(room, row, of_row, count, scale, largest + row);
        shrink[row] = of_row.end <= 0 ? 1 : before == -INFINITY ? 0 : exp2f(before - largest[row]);
        sums[row] = of_row.end <= 0 ? sums[row] : sums[row] * shrink[row] + sum;
    }
    float *added = room->scores;
    for (int64_t first = 0; first < value_size; first += TILE) {
        begin(is_pair, 0, NULL, 0);
        for (int64_t group = 0; group < used; group++)
            multiply(is_pair, room->weights + group * UNIT_NUMBERS, token_groups * UNIT_NUMBERS,
                     room->values + (first / TILE * token_groups + group) * 2 * UNIT_NUMBERS);
        end(is_pair, added, TILE);
        for (int64_t row = 0; row < rows; row++)
            for (int half = 0; half < 2; half++) {
                float *to = out + row * out_stride + first + half * LANES;
                store(to, load(to) * shrink[row] + load(added + row * TILE + half * LANES));
            }
    }
}

/* As `attend_chunk`, of a cache in bf16; key_size and value_size are multiples of 32. */
static OUTLINED void attend_chunk_on_unit(
    const CacheLayout *layout, const Window *window, const Group *group, const float *queries, int64_t stride,
    int64_t heads, const void *cache, float *out, void *shared
) {
    int64_t kv_heads = layout->kv_heads, key_size = layout->key_size, value_size = layout->value_size;
    int64_t sharing = heads / kv_heads, out_stride = heads * value_size, key_groups = key_size / UNIT_INPUTS;
    int64_t rows = group->count, start = group->longest - rows, parts = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    int64_t shares = (sharing + UNIT_HEADS - 1) / UNIT_HEADS, of_head = CHUNK_ROWS * key_size;
    float factor = layout->scale * 1.44269504f;
    UnitRoom room = {
        .keys = aligned_alloc(64, UNIT_SPLIT * key_size * sizeof(uint16_t)),
        .values = aligned_alloc(64, UNIT_SPLIT * value_size * sizeof(uint16_t)),
        .queries = aligned_alloc(64, UNIT_HEADS * of_head * sizeof(uint16_t)),
        .weights = aligned_alloc(64, 2 * UNIT_ROWS * UNIT_SPLIT * sizeof(uint16_t)),
        .scores = aligned_alloc(64, 2 * UNIT_ROWS * UNIT_SPLIT * sizeof(float)),
        .largest = malloc(UNIT_HEADS * CHUNK_ROWS * sizeof(float)),
        .sums = malloc(UNIT_HEADS * CHUNK_ROWS * sizeof(float)),
    };
    configure_unit();
#pragma omp for collapse(3) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int64_t of_group = 0; of_group < shares; of_group++) {
                /* The longest first. */
                int64_t from = (parts - 1 - part) * CHUNK_ROWS;
                int64_t to = from + CHUNK_ROWS < rows ? from + CHUNK_ROWS : rows;
                int64_t first_head = kv_head * sharing + of_group * UNIT_HEADS;
                int64_t taken = sharing - of_group * UNIT_HEADS;
                if (taken > UNIT_HEADS) taken = UNIT_HEADS;
                int64_t shift = shift_of(layout, kv_head);
                for (int64_t index = 0; index < taken * CHUNK_ROWS; index++)
                    room.largest[index] = -INFINITY, room.sums[index] = 0;
                for (int64_t row = from; row < to; row++) {
                    memset(out + row * out_stride + first_head * value_size, 0, taken * value_size * sizeof(float));
                    for (int64_t head = 0; head < taken; head++)
                        narrow_row_for_unit(queries + row * stride + (first_head + head) * key_size, key_size,
                                            row - from, room.queries + head * of_head);
                }
                for (int64_t first = 0; first < start + to; first += UNIT_SPLIT) {
                    int64_t left = start + to - first, found = left < UNIT_SPLIT ? left : UNIT_SPLIT;
                    found = needed_of_split(window, start + from, first, found);
                    if (!found) continue;
                    int64_t count = (found + UNIT_INPUTS - 1) / UNIT_INPUTS * UNIT_INPUTS, offsets[UNIT_SPLIT];
                    find(layout, group->blocks, kv_head * key_size, first, found, 0, 0, offsets);
                    for (int64_t token = found; token < count; token++) offsets[token] = offsets[found - 1];
                    lay_out_for_unit(cache, offsets, count, shift, key_size, value_size, &room);
                    for (int64_t head = 0; head < taken; head++)
                        for (int64_t row = from; row < to; row += 2 * UNIT_ROWS) {
                            int64_t several = to - row < 2 * UNIT_ROWS ? to - row : 2 * UNIT_ROWS;
                            int64_t state = head * CHUNK_ROWS + row - from;
                            if (start + row + several <= first) continue;
                            if (!needed_of_split(window, start + row, first, found)) continue;
                            const uint16_t *of_rows =
                                room.queries + head * of_head + (row - from) * key_groups * UNIT_INPUTS;
                            float *result = out + row * out_stride + (first_head + head) * value_size;
#define ROWS_OF(is_pair)                                                                                            \
    attend_unit_rows(is_pair, several, &room, of_rows, window, start + row, first, count, key_size, value_size,     \
                 factor, room.largest + state, room.sums + state, result, out_stride)
                            if (several > UNIT_ROWS) ROWS_OF(1);
                            else ROWS_OF(0);
#undef ROWS_OF
                        }
                }
                for (int64_t head = 0; head < taken; head++)
                    for (int64_t row = from; row < to; row++) {
                        float *result = out + row * out_stride + (first_head + head) * value_size;
                        float sum = room.sums[head * CHUNK_ROWS + row - from];
                        for (int64_t index = 0; index < value_size; index++) result[index] /= sum;
                    }
            }
    _tile_release();
    free(room.keys);
    free(room.values);
    free(room.queries);
    free(room.weights);
    free(room.scores);
    free(room.largest);
    free(room.sums);
}

#endif

int64_t attend_bytes(const CacheLayout *layout, const Group *group, int64_t heads) {
    int64_t splits = (group->longest + SPLIT - 1) / SPLIT;
    return group->lengths ? group->count * splits * heads * (layout->value_size + 2) * sizeof(float) : 0;
}

typedef void (*Attention)(
    const CacheLayout *, const Window *, const Group *, const float *, int64_t, int64_t, const void *, float *, void *
);

/* Attention of a group's rows, [rows, heads, key_size], whose numbers lie `stride` apart, to [rows, heads, value_size].
 */
void attend(
    const CacheLayout *layout, const Window *window, const Group *group, const float *queries, int64_t stride,
    int64_t heads, const void *cache, float *out, int narrowness, void *shared
) {
    queries += group->first_row * stride;
    out += group->first_row * heads * layout->value_size;
    Attention run = attend_chunk;
    if (group->lengths) run = layout->is_bf16 ? rows_apart_in_bf16 : rows_apart_in_fp32;
#if HAS_BF16
    int fits = layout->key_size % UNIT_INPUTS == 0 && layout->value_size % UNIT_INPUTS == 0;
    if (!group->lengths && layout->is_bf16 && fits && narrowness != EXACT) {
        run = attend_chunk_in_bf16;
#if HAS_MATRIX_UNIT
        if (narrowness == ANY_ROWS) run = attend_chunk_on_unit;
#endif
    }
#endif
    run(layout, window, group, queries, stride, heads, cache, out, shared);
}

void tidegate_attend(
    const CacheLayout *layout, const Window *window, const Group *group, const float *queries, int64_t stride,
    int64_t heads, const void *cache, float *out, int narrowness, int threads
) {
    void *shared = shared_memory(attend_bytes(layout, group, heads));
#pragma omp parallel num_threads(threads)
    attend(layout, window, group, queries, stride, heads, cache, out, narrowness, shared);
    free(shared);
}

int64_t tidegate_lanes(void) { return LANES; }
