/* All layers of a Llama-like model in one team of threads: between products nobody waits for Python.
 *
 * Invariants: no memory is kept between calls; the result is that of the layers' products and attention, called one by
 * one.
 */

#include "calls.h"
#include "vectors.h"

typedef struct {
    Weight qkv, output, gate_up, down;
    const float *attention_norm, *mlp_norm, *head_norms;
    void *cache;
} Layer;

/* `hidden` [rows, hidden size] is what goes in and comes out; the others are memory for a layer's results. */
typedef struct {
    float *hidden, *qkv, *attended, *gate_up;
    int64_t rows, heads, qkv_stride, gate_up_stride, group_count;
    const Group *groups;
    CacheLayout layout;
    Places places;
    Window window;
    float epsilon;
} Step;

INLINE int64_t larger_size(int64_t one, int64_t other) { return one > other ? one : other; }

static int64_t layer_bytes(const Layer *layer, const Step *step, int narrowness) {
    const Weight *weights[] = {&layer->qkv, &layer->output, &layer->gate_up, &layer->down};
    int64_t most = 0;
    for (int index = 0; index < 4; index++) most = larger_size(most, linear_bytes(weights[index], step->rows, narrowness));
    for (int64_t index = 0; index < step->group_count; index++)
        most = larger_size(most, attend_bytes(&step->layout, step->groups + index, step->heads));
    return most;
}

static void run_layer(const Layer *layer, const Step *step, int narrowness, void *shared) {
    int64_t rows = step->rows, size = layer->qkv.inputs, attended = layer->output.inputs;
    Out onto_hidden = {step->hidden, size, 1};
    Rows before = {step->hidden, layer->attention_norm, size, rows, NORMED, step->epsilon};
    linear(&layer->qkv, &before, &(Out){step->qkv, step->qkv_stride, 0}, narrowness, shared);
    rotate_and_write(&step->layout, &step->places, step->qkv, step->qkv_stride, rows, step->heads, layer->head_norms,
                     step->epsilon, layer->cache);
    for (int64_t index = 0; index < step->group_count; index++)
        attend(&step->layout, &step->window, step->groups + index, step->qkv, step->qkv_stride, step->heads,
               layer->cache, step->attended, narrowness, shared);
    linear(&layer->output, &(Rows){step->attended, NULL, attended, rows, AS_THEY_ARE, 0}, &onto_hidden, narrowness, shared);
    before.norm = layer->mlp_norm;
    linear(&layer->gate_up, &before, &(Out){step->gate_up, step->gate_up_stride, 0}, narrowness, shared);
    linear(&layer->down, &(Rows){step->gate_up, NULL, step->gate_up_stride, rows, GATED, 0}, &onto_hidden, narrowness, shared);
}

void tidegate_layers(const Layer *layers, int64_t count, const Step *step, int narrowness, int threads) {
    int64_t most = 0;
    for (int64_t index = 0; index < count; index++)
        most = larger_size(most, layer_bytes(layers + index, step, narrowness));
    void *shared = shared_memory(most);
#pragma omp parallel num_threads(threads)
    for (int64_t index = 0; index < count; index++) run_layer(layers + index, step, narrowness, shared);
    free(shared);
}
