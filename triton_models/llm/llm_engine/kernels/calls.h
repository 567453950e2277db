/* What kernels are given, and those that a team of threads computes together: all threads of a parallel region call
 * them with the same arguments. `cpu_kernels.py` has the same structures. Each file includes it for itself.
 */

#ifndef TIDEGATE_CALLS_H
#define TIDEGATE_CALLS_H

#include <stdint.h>

/* A weight [outputs, inputs]. Of four and eight bits, tiles: a word holds consecutive inputs of one output, 8 of four
 * bits or 4 of eight; the words of TILE outputs stand side by side, then come their next inputs. A group's scales are
 * TILE halves; with four bits, TILE offsets follow. Of sixteen bits, as it was read.
 */
typedef struct {
    const void *numbers;
    const uint16_t *scales;
    const float *bias;
    int64_t outputs, inputs, packing;
} Weight;

enum { AS_THEY_ARE, NORMED, GATED };

/* Rows, and what is done with them before they are multiplied: nothing, RMSNorm with these weights, or SwiGLU. A row
 * for SwiGLU is its gates, then what they are for.
 */
typedef struct {
    const float *numbers, *norm;
    int64_t stride, count, before;
    float epsilon;
} Rows;

/* Where results go, or what they are added to. */
typedef struct {
    float *numbers;
    int64_t stride, adds;
} Out;

/* How a layer's cache lies: blocks of `block_tokens` tokens of `token_size` numbers, of each token the keys of all
 * heads, and from `values_at` on the values.
 */
typedef struct {
    int64_t is_bf16, block_tokens, token_size, kv_heads, key_size, value_size, values_at;
    float scale;
} CacheLayout;

/* Rows at `begins_at` and later see the `newest` tokens, their own included, and the first `sinks`. */
typedef struct {
    int64_t newest, begins_at, sinks;
} Window;

/* Rows that attend together. With `lengths`, one of each sequence, which sees so many tokens, where of its blocks the
 * `hidden` ones behind the window's sinks are not counted, and `longest` is the largest. Without, consecutive rows of
 * one sequence, up to its token `longest`.
 */
typedef struct {
    const int64_t *blocks, *lengths, *hidden;
    int64_t blocks_stride, first_row, count, longest;
} Group;

/* What turns queries and keys, and where tokens are kept. */
typedef struct {
    const float *cosines, *sines;
    const int64_t *positions, *slots;
} Places;

#define TEAM __attribute__((visibility("hidden")))

/* Memory that a team shares for a product of so many rows. */
TEAM int64_t linear_bytes(const Weight *weight, int64_t rows, int narrowness);
TEAM void linear(const Weight *weight, const Rows *rows, const Out *out, int narrowness, void *shared);

TEAM void rotate_and_write(
    const CacheLayout *layout, const Places *places, float *qkv, int64_t stride, int64_t rows, int64_t heads,
    const float *norms, float epsilon, void *cache
);

/* Memory that a team shares for a group's attention. */
TEAM int64_t attend_bytes(const CacheLayout *layout, const Group *group, int64_t heads);
TEAM void attend(
    const CacheLayout *layout, const Window *window, const Group *group, const float *queries, int64_t stride,
    int64_t heads, const void *cache, float *out, int narrowness, void *shared
);

#endif
