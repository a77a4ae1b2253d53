// Attention of a call's new frames over a ring of past ones and over each other, heads apart.
//
//   s_nj = q_n . past_k_j + hidden_nj   for the T past frames j, then q_n . k_j + hidden_nj for the call's own
//   y_n  = sum_j softmax(s)_nj v_j
//
// q, k (items, frames, keys); v, y (items, frames, features), an item is a head of a batch's entry; past_k (items,
// past, keys), past_v (items, past, features), in float or, where k_scale (v_scale) is not 0, rounded to uint8:
// value = scale (integer - zero), zero itself an integer. Where a processor sums products of integers, queries that meet
// them have 15 bits; weights have 15, or 8 where it sums products of bytes, of the largest that a frame gives to its past,
// and what they make is scaled to what they weighed before. hidden (frames, past + frames), the same for all items; minus
// infinity hides, but not everything from a frame. All contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Chunks are large: rows that are read in pieces come a third slower from memory, which costs two or four threads more
// than eight lose by it.
enum { EDGESEP_ATTENTION_GROUP = 16, EDGESEP_ATTENTION_CHUNK = 2048 };

typedef struct {
  const float *q, *k, *v, *hidden;
  const void *past_k, *past_v;
  float* y;
  float* weights;  // workspace, edgesep_attention_workspace floats
  int64_t items, frames, past, keys, features;
  float k_scale, k_zero, v_scale, v_zero;
} EdgesepAttention;

// Two passes: all rows of the first, which fills the workspace, then all of the second. Rows of the first are items;
// of the second items x chunks of features.
static inline int64_t edgesep_attention_groups(const EdgesepAttention* s) {
  return (s->frames + EDGESEP_ATTENTION_GROUP - 1) / EDGESEP_ATTENTION_GROUP;
}
static inline int64_t edgesep_attention_workspace(const EdgesepAttention* s) {
  return s->items * edgesep_attention_groups(s) * (s->past + s->frames) * EDGESEP_ATTENTION_GROUP;
}
static inline int64_t edgesep_attention_chunks(const EdgesepAttention* s) {
  return (s->features + EDGESEP_ATTENTION_CHUNK - 1) / EDGESEP_ATTENTION_CHUNK;
}
void edgesep_attention_weights(const EdgesepAttention*, int64_t first, int64_t end);
void edgesep_attention_values(const EdgesepAttention*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
