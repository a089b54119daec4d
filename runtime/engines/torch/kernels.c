/* What a step does between its matrix products, on one CPU thread, for one element type a build
   (-DBFLOAT16, -DFLOAT16, else float). Plain loops that compilers turn into vector code.

   A layer's KV is [blocks, block_tokens, 2, kv_heads, head_dim]; the fused projection of a token
   is [heads + 2 * kv_heads, head_dim]; the rope table is [positions, head_dim], cosines | sines. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

#if defined(BFLOAT16)
typedef uint16_t element;
INLINE float load(element x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE element store(float value) { /* to the nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (element)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
#else
#if defined(FLOAT16)
typedef _Float16 element;
#else
typedef float element;
#endif
INLINE float load(element x) { return (float)x; }
INLINE element store(float value) { return (element)value; }
#endif

typedef struct {
    int32_t heads, kv_heads, head_dim, block_tokens;
    float norm_eps, scale;
} shape;

/* e^x for x <= 88, by 2^n * e^r with |r| <= ln(2) / 2: within 2e-7, and vectorisable. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float sum = 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = (sum * r + 1.0f) * r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return sum * power;
}

INLINE void normalise(const element *x, const element *weight, element *out, int64_t width, float eps) {
    float squares = 0;
    for (int64_t i = 0; i < width; i++)
        squares += load(x[i]) * load(x[i]);
    float factor = 1.0f / sqrtf(squares / width + eps);
    for (int64_t i = 0; i < width; i++)
        out[i] = store(load(store(load(x[i]) * factor)) * load(weight[i]));
}

/* hidden += added, where there is any; out = RMS norm of hidden. All [rows, width]. */
void add_norm(element *hidden, const element *added, const element *weight, element *out, int64_t rows,
              int64_t width, float eps) {
    for (int64_t row = 0; row < rows; row++) {
        element *x = hidden + row * width;
        if (added)
            for (int64_t i = 0; i < width; i++)
                x[i] = store(load(x[i]) + load(added[row * width + i]));
        normalise(x, weight, out + row * width, width, eps);
    }
}

/* silu(gate) * up of gate_up [rows, 2 * width], as [rows, width] over its first half: a row goes
   where rows are that are done, row 0 over its own gate, element by element. */
void silu_multiply(element *gate_up, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++) {
        const element *gate = gate_up + row * 2 * width, *up = gate + width;
        element *out = gate_up + row * width;
#pragma GCC ivdep
        for (int64_t i = 0; i < width; i++) {
            float x = load(gate[i]), away = exponential(x < -87.0f ? 87.0f : -x);
            out[i] = store(load(store(x / (1.0f + away))) * load(up[i]));
        }
    }
}

INLINE void turn(element *head, const element *rope, int half) {
    for (int i = 0; i < half; i++) {
        float left = load(head[i]), right = load(head[i + half]);
        float cosine = load(rope[i]), sine = load(rope[i + half]);
        head[i] = store(left * cosine - right * sine);
        head[i + half] = store(right * cosine + left * sine);
    }
}

/* Normalise (where there are weights) and turn queries and keys in place; store keys and values. */
void store_kv(const shape *s, int64_t tokens, const int64_t *positions, const int64_t *kv_slots,
              const element *rope, const element *q_norm, const element *k_norm, element *qkv, element *kv) {
    int64_t head_dim = s->head_dim, width = (s->heads + 2 * s->kv_heads) * head_dim;
    int64_t stored = 2 * s->kv_heads * head_dim;
    for (int64_t token = 0; token < tokens; token++) {
        element *states = qkv + token * width;
        for (int head = 0; head < s->heads + s->kv_heads; head++) {
            element *state = states + head * head_dim;
            const element *weight = head < s->heads ? q_norm : k_norm;
            if (weight)
                normalise(state, weight, state, head_dim, s->norm_eps);
            turn(state, rope + positions[token] * head_dim, head_dim / 2);
        }
        memcpy(kv + kv_slots[token] * stored, states + s->heads * head_dim, stored * sizeof(element));
    }
}

/* One token's attention, a block at a time: the scores of all its heads, then a softmax that goes
   on from block to block (highest score so far, sum of weights, weighted values). The rows of a
   block are read in the order in which they lie: memory is what this waits for. */
INLINE void score_block(const shape *s, int group, int head_dim, int tokens, const element *block,
                        const float *queries, float *scores) {
    int64_t stride = (int64_t)s->kv_heads * head_dim;
    float row[head_dim];
    for (int t = 0; t < tokens; t++) {
        const element *keys = block + 2 * t * stride;
        for (int head = 0; head < s->kv_heads; head++) {
            const element *key = keys + head * head_dim;
            for (int i = 0; i < head_dim; i += 64 / (int)sizeof(element))
                __builtin_prefetch(key + stride + i); /* the value, which is wanted soon */
            for (int i = 0; i < head_dim; i++)
                row[i] = load(key[i]);
            for (int g = 0; g < group; g++) {
                const float *query = queries + (head * group + g) * head_dim;
                float score = 0;
                for (int i = 0; i < head_dim; i++)
                    score += query[i] * row[i];
                scores[(head * group + g) * s->block_tokens + t] = score;
            }
        }
    }
}

INLINE void softmax_block(int head_dim, int tokens, float *scores, float *highest, float *total,
                          float *weighted) {
    float top = *highest, sum = 0;
    for (int t = 0; t < tokens; t++)
        top = scores[t] > top ? scores[t] : top;
    if (top > *highest) {
        float shrink = exponential(*highest - top);
        *total *= shrink;
        for (int i = 0; i < head_dim; i++)
            weighted[i] *= shrink;
        *highest = top;
    }
    for (int t = 0; t < tokens; t++)
        sum += scores[t] = exponential(scores[t] - top);
    *total += sum;
}

INLINE void weigh_block(const shape *s, int group, int head_dim, int tokens, const element *block,
                        const float *scores, float *weighted) {
    int64_t stride = (int64_t)s->kv_heads * head_dim;
    for (int head = 0; head < s->kv_heads; head++) {
        for (int g = 0; g < group; g++) {
            const float *weights = scores + (head * group + g) * s->block_tokens;
            float *to = weighted + (head * group + g) * head_dim, sum[head_dim];
            for (int i = 0; i < head_dim; i++)
                sum[i] = to[i];
            for (int t = 0; t < tokens; t++) {
                const element *value = block + (2 * t + 1) * stride + head * head_dim;
                for (int i = 0; i < head_dim; i++)
                    sum[i] += weights[t] * load(value[i]);
            }
            for (int i = 0; i < head_dim; i++)
                to[i] = sum[i];
        }
    }
}

INLINE void attend_token(const shape *s, int group, int head_dim, int64_t context, const int32_t *table,
                         const element *token, const element *kv, element *out, float *scratch) {
    int heads = s->kv_heads * group;
    float *queries = scratch, *weighted = queries + heads * head_dim;
    float *highest = weighted + heads * head_dim, *sums = highest + heads, *scores = sums + heads;
    int64_t block_size = 2 * (int64_t)s->block_tokens * s->kv_heads * head_dim;
    for (int i = 0; i < heads * head_dim; i++)
        queries[i] = load(token[i]) * s->scale;
    for (int i = 0; i < heads * head_dim; i++)
        weighted[i] = 0;
    for (int i = 0; i < heads; i++)
        highest[i] = -1e30f, sums[i] = 0;
    for (int64_t begin = 0; begin < context; begin += s->block_tokens, table++) {
        int64_t left = context - begin;
        int tokens = left < s->block_tokens ? (int)left : s->block_tokens;
        const element *block = kv + *table * block_size;
        score_block(s, group, head_dim, tokens, block, queries, scores);
        for (int head = 0; head < heads; head++)
            softmax_block(head_dim, tokens, scores + head * s->block_tokens, highest + head, sums + head,
                          weighted + head * head_dim);
        weigh_block(s, group, head_dim, tokens, block, scores, weighted);
    }
    for (int head = 0; head < heads; head++)
        for (int i = 0; i < head_dim; i++)
            out[head * head_dim + i] = store(weighted[head * head_dim + i] / sums[head]);
}

/* Attention of the first `tokens` tokens of a step, each to its request's KV up to its own
   position. slots: each token's row of the block tables. scratch: 2 * heads * head_dim +
   2 * heads + heads * block_tokens floats. */
void attend(const shape *s, int64_t tokens, const int64_t *positions, const int32_t *slots,
            const int32_t *tables, int64_t table_width, const element *qkv, const element *kv, element *out,
            float *scratch) {
    int64_t width = (int64_t)(s->heads + 2 * s->kv_heads) * s->head_dim;
    int64_t out_width = (int64_t)s->heads * s->head_dim;
    int group = s->heads / s->kv_heads;
    for (int64_t token = 0; token < tokens; token++) {
        const int32_t *table = tables + slots[token] * table_width;
        const element *states = qkv + token * width;
        element *to = out + token * out_width;
        int64_t context = positions[token] + 1;
        /* Constants let the compiler unroll; the shapes are those of most models. */
        /* clang-format off */
#define SHAPE(GROUP, DIM)                                                                       \
    if (group == GROUP && s->head_dim == DIM)                                                   \
        attend_token(s, GROUP, DIM, context, table, states, kv, to, scratch);                   \
    else
        SHAPE(2, 64) SHAPE(4, 64) SHAPE(7, 64) SHAPE(2, 128) SHAPE(4, 128) SHAPE(8, 128)
        attend_token(s, group, s->head_dim, context, table, states, kv, to, scratch);
        /* clang-format on */
    }
}
