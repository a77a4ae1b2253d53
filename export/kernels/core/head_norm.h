// Heads of a projection apart, each normalized over its features and all bins of a frame.
//
//   v_nhfi = act(x[n, f, first + h features + i])                            act(v) = max(v, slope v)
//   y_hnfi = gain_hfi (v_nhfi - mean_nh) / sqrt(var_nh + epsilon) + bias_hfi
//
// x (frames, bins, channels); slope (features of all heads), or null; gain, bias (heads, bins, features); y (heads,
// frames, bins, features). All contiguous.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EDGESEP_HEAD_NORM_SMALL = 8192 };

typedef struct {
  const float *x, *slope, *gain, *bias;
  float* y;
  int64_t frames, bins, channels, first, heads, features;
  float epsilon;
} EdgesepHeadNorm;

// Rows of work: frames, or all of them where another thread would take longer to begin than to do its share.
static inline int64_t edgesep_head_norm_frames(const EdgesepHeadNorm* s) {
  return s->frames * s->bins * s->heads * s->features > EDGESEP_HEAD_NORM_SMALL ? 1 : s->frames;
}
static inline int64_t edgesep_head_norm_rows(const EdgesepHeadNorm* s) {
  return s->frames / edgesep_head_norm_frames(s);
}
void edgesep_head_norm(const EdgesepHeadNorm*, int64_t first, int64_t end);

#ifdef __cplusplus
}
#endif
