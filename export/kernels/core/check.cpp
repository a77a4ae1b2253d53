#include "check.h"

namespace edgesep {

const char* const kScanNames[kScanInputs] = {"u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"};
const char* const kConvNames[kConvInputs] = {"x", "weight", "bias"};
const char* const kNormNames[kNormInputs] = {"x",    "weight", "bias",    "gamma",  "beta",    "gate",   "shift",
                                             "index", "x_stats", "x_bias", "x_gamma", "x_beta", "x_shift", "x_index"};
const char* const kPooledNames[kPooledInputs] = {"total",   "x",      "index",   "weight",
                                                 "x_stats", "x_bias", "x_gamma", "x_beta"};
const char* const kHeadNormNames[kHeadNormInputs] = {"x", "gain", "bias", "slope"};
const char* const kAttentionNames[kAttentionInputs] = {"q", "k", "v", "past_k", "past_v", "hidden"};
const char* const kLstmNames[kLstmInputs] = {"gates",     "recurrent", "initial_h",
                                              "initial_c", "order",     "scale"};
const char* const kWindowNames[kWindowInputs] = {"x", "weight", "bias", "index", "slope", "residual", "scale"};
const char* const kMambaNames[kMambaInputs] = {"x",     "in",        "conv_weight", "conv_bias", "states",  "steps",
                                               "step_bias", "A", "D", "out", "through", "bias",
                                               "in_scale", "states_scale", "out_scale"};

namespace {

std::string text(const Dims& dims) {
  std::string out = "(";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + ")";
}

// Windows' taps of so many sums for the fast algorithm (unfolded_product.h), 0 if there are none.
int64_t taps_of_parts(int64_t parts) {
  for (int64_t taps : {4, 8})
    if (parts == edgesep_unfolded_parts(taps)) return taps;
  return 0;
}

// The first input that is missing or differs from what the first ones determine.
std::string first_misfit(const std::vector<Input>& inputs, const char* const* names, int required,
                         std::initializer_list<Dims> wanted) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].given) {
      if (static_cast<int>(i) < required) return std::string(names[i]) + " is missing";
    } else if (inputs[i].dims != wanted.begin()[i]) {
      return std::string(names[i]) + " has shape " + text(inputs[i].dims) + ", expected " + text(wanted.begin()[i]) +
             " beside " + names[0] + " " + text(inputs[0].dims);
    }
  }
  return "";
}

std::string sequence(const Input& input, const char* name) {
  if (!input.given) return std::string(name) + " is missing";
  for (int64_t n : input.dims)
    if (n < 1) return std::string(name) + " has shape " + text(input.dims) + ": no dimension may be 0";
  if (input.dims.size() != 3)
    return std::string(name) + " has shape " + text(input.dims) + ", expected (batch, length, channels)";
  return "";
}

// Rows: (batch, frames, channels), perhaps with an axis of one between.
std::string rows(const Input& input, const char* name, int64_t* batch) {
  if (!input.given) return std::string(name) + " is missing";
  for (int64_t n : input.dims)
    if (n < 1) return std::string(name) + " has shape " + text(input.dims) + ": no dimension may be 0";
  const size_t rank = input.dims.size();
  if (rank < 3 || rank > 4 || (rank == 4 && input.dims[1] != 1))  // a norm is over all of an item
    return std::string(name) + " has shape " + text(input.dims) + ", expected (batch, 1, frames, channels)";
  *batch = input.dims[0];
  return "";
}

}  // namespace

std::string check_scan(const std::vector<Input>& in, EdgesepScan* sizes) {
  if (in.size() < kScanRequired || in.size() > kScanInputs)
    return "SelectiveScan takes 5 to 9 inputs, got " + std::to_string(in.size());
  if (std::string wrong = sequence(in[0], "u"); !wrong.empty()) return wrong;
  const int64_t batch = in[0].dims[0], length = in[0].dims[1], channels = in[0].dims[2];
  if (!in[2].given || in[2].dims.size() != 2 || in[2].dims[1] < 1)
    return "A has shape " + text(in[2].dims) + ", expected (" + std::to_string(channels) + ", state)";
  const int64_t state = in[2].dims[1];
  if (state > EDGESEP_SCAN_MAX_STATE)
    return "A has " + std::to_string(state) + " states, at most " + std::to_string(EDGESEP_SCAN_MAX_STATE) +
           " are supported; use the portable scan";
  const Dims sequence_shape = {batch, length, channels}, mixing = {batch, length, state};
  sizes->batch = batch;
  sizes->length = length;
  sizes->channels = channels;
  sizes->state = state;
  return first_misfit(in, kScanNames, kScanRequired,
                      {sequence_shape, sequence_shape, {channels, state}, mixing, mixing, {channels}, sequence_shape,
                       {channels}, {batch, channels, state}});
}

std::string check_conv(const std::vector<Input>& in, EdgesepConv* sizes) {
  if (in.size() != kConvInputs) return "CausalConv1dSilu takes 3 inputs, got " + std::to_string(in.size());
  if (std::string wrong = sequence(in[0], "x"); !wrong.empty()) return wrong;
  const int64_t channels = in[0].dims[2];
  if (!in[1].given || in[1].dims.size() != 2 || in[1].dims[1] < 1 || in[1].dims[1] > EDGESEP_CONV_MAX_TAPS)
    return "weight has shape " + text(in[1].dims) + ", expected (" + std::to_string(channels) + ", 1 to " +
           std::to_string(EDGESEP_CONV_MAX_TAPS) + ")";
  sizes->batch = in[0].dims[0];
  sizes->length = in[0].dims[1];
  sizes->channels = channels;
  sizes->taps = in[1].dims[1];
  return first_misfit(in, kConvNames, kConvInputs, {in[0].dims, {channels, sizes->taps}, {channels}});
}

std::string check_norm(const std::vector<Input>& in, int64_t stride, EdgesepConvNorm* sizes) {
  if (in.size() != kNormInputs) return "ConvNorm takes up to 14 inputs, got " + std::to_string(in.size());
  if (std::string wrong = rows(in[0], "x", &sizes->batch); !wrong.empty()) return wrong;
  const size_t rank = in[0].dims.size();
  const int64_t channels = in[0].dims[rank - 1];
  sizes->channels = channels;
  sizes->frames_in = in[0].dims[rank - 2];
  sizes->taps = 1;
  if (in[1].given) {
    sizes->taps = in[1].dims.empty() ? 0 : in[1].dims[0];
    if (sizes->taps < 1 || sizes->taps > EDGESEP_NORM_MAX_TAPS || sizes->taps % 2 == 0)
      return "weight has shape " + text(in[1].dims) + ", expected (1, 3, 5 or 7 taps, " + std::to_string(channels) + ")";
  }
  if (stride < 1 || (stride > 1 && !in[1].given))
    return "stride is " + std::to_string(stride) + ", at least 1 was expected, and 1 without a weight";
  sizes->stride = stride;
  sizes->frames = (sizes->frames_in - 1) / stride + 1;
  if (in[3].given != in[4].given) return "gamma and beta belong together, one of them is missing";
  sizes->coarse = sizes->frames;
  for (size_t i : {5, 6}) {
    if (!in[i].given) continue;
    int64_t batch = 0;
    if (std::string wrong = rows(in[i], kNormNames[i], &batch); !wrong.empty()) return wrong;
    if (in[kNormIndex].given) sizes->coarse = in[i].dims[in[i].dims.size() - 2];
  }
  sizes->x_coarse = sizes->frames_in;
  if (in[12].given && in[kNormReadIndex].given && in[12].dims.size() == rank) sizes->x_coarse = in[12].dims[rank - 2];
  if (in[8].given != in[10].given || in[8].given != in[11].given || (in[9].given && !in[8].given))
    return "x_stats, x_gamma and x_beta belong together (x_bias with them), one of them is missing";
  Dims joined = in[0].dims, read = in[0].dims;
  joined[rank - 2] = sizes->coarse;
  read[rank - 2] = sizes->x_coarse;
  const Dims vector = {channels};
  return first_misfit(in, kNormNames, kNormRequired,
                      {in[0].dims,
                       {sizes->taps, channels},
                       vector,
                       vector,
                       vector,
                       joined,
                       joined,
                       {sizes->frames},
                       {sizes->batch, 2},
                       vector,
                       vector,
                       vector,
                       read,
                       {sizes->frames_in}});
}

std::string check_stats(const std::vector<Input>& in, EdgesepConvNorm* sizes) {
  if (in.size() != kStatsInputs) return "GlobalStats takes 1 or 2 inputs, got " + std::to_string(in.size());
  std::vector<Input> all(kNormInputs);
  all[0] = in[0];
  all[2] = in[1];
  return check_norm(all, 1, sizes);
}

std::string check_pooled(const std::vector<Input>& in, EdgesepPooled* sizes) {
  if (in.size() != kPooledInputs) return "PooledSum takes up to 8 inputs, got " + std::to_string(in.size());
  int64_t batch = 0;
  if (std::string wrong = rows(in[0], "total", &sizes->batch); !wrong.empty()) return wrong;
  if (std::string wrong = rows(in[1], "x", &batch); !wrong.empty()) return wrong;
  const size_t rank = in[0].dims.size();
  sizes->coarse = in[0].dims[rank - 2];
  sizes->channels = in[0].dims[rank - 1];
  sizes->frames = in[1].dims[in[1].dims.size() - 2];
  if (in[3].dims.size() != 2) return "weight has shape " + text(in[3].dims) + ", expected (coarse frames, span)";
  sizes->span = in[3].dims[1];
  Dims fine = in[0].dims;
  fine[rank - 2] = sizes->frames;
  if (in[4].given != in[6].given || in[4].given != in[7].given || (in[5].given && !in[4].given))
    return "x_stats, x_gamma and x_beta belong together (x_bias with them), one of them is missing";
  const Dims vector = {sizes->channels};
  return first_misfit(in, kPooledNames, kPooledRequired,
                      {in[0].dims,
                       fine,
                       {sizes->coarse * sizes->span},
                       {sizes->coarse, sizes->span},
                       {sizes->batch, 2},
                       vector,
                       vector,
                       vector});
}

std::string check_head_norm(const std::vector<Input>& in, EdgesepHeadNorm* sizes) {
  if (in.size() != kHeadNormInputs) return "HeadNorm takes 3 or 4 inputs, got " + std::to_string(in.size());
  const Dims&x = in[0].dims, &gain = in[1].dims;
  if (!in[1].given || gain.size() != 3 || gain[0] < 1 || gain[1] < 1 || gain[2] < 1)
    return "gain has shape " + text(gain) + ", expected (heads, bins, features)";
  sizes->heads = gain[0], sizes->bins = gain[1], sizes->features = gain[2];
  sizes->channels = x.empty() ? 0 : x.back();
  const int64_t end = sizes->first + sizes->heads * sizes->features;
  if (!in[0].given || sizes->first < 0 || end > sizes->channels)
    return "x has shape " + text(x) + ", expected rows of " + std::to_string(end) + " channels or more";
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); ++i) rows *= x[i];
  if (rows < 1 || rows % sizes->bins)
    return "x has shape " + text(x) + ", expected frames of " + std::to_string(sizes->bins) + " rows";
  sizes->frames = rows / sizes->bins;
  return first_misfit(in, kHeadNormNames, kHeadNormRequired, {x, gain, gain, {sizes->heads * sizes->features}});
}

std::string check_attention(const std::vector<Input>& in, EdgesepAttention* sizes) {
  if (in.size() != kAttentionInputs) return "PastAttention takes 6 inputs, got " + std::to_string(in.size());
  for (int i : {0, 2, 3}) {
    if (!in[i].given) return std::string(kAttentionNames[i]) + " is missing";
    for (int64_t n : in[i].dims)
      if (n < 1)
        return std::string(kAttentionNames[i]) + " has shape " + text(in[i].dims) + ": no dimension may be 0";
    if (in[i].dims.size() != 4)
      return std::string(kAttentionNames[i]) + " has shape " + text(in[i].dims) +
             ", expected (batch, heads, frames, features)";
  }
  const Dims& q = in[0].dims;
  sizes->items = q[0] * q[1];
  sizes->frames = q[2];
  sizes->keys = q[3];
  sizes->features = in[2].dims[3];
  sizes->past = in[3].dims[2];
  return first_misfit(in, kAttentionNames, kAttentionInputs,
                      {q,
                       q,
                       {q[0], q[1], q[2], sizes->features},
                       {q[0], q[1], sizes->past, sizes->keys},
                       {q[0], q[1], sizes->past, sizes->features},
                       {sizes->frames, sizes->past + sizes->frames}});
}

std::string check_lstm(const std::vector<Input>& in, EdgesepLstm* sizes) {
  if (in.size() != kLstmInputs) return "LstmSteps takes 4 to 6 inputs, got " + std::to_string(in.size());
  const Dims&gates = in[0].dims, &recurrent = in[1].dims, &state = in[2].dims, &order = in[4].dims;
  if (!in[0].given) return "gates is missing";
  const bool bytes = in[kLstmScale].given;
  sizes->hidden = state.empty() ? 0 : state.back();
  const int64_t groups = (sizes->hidden + EDGESEP_LSTM_GROUP - 1) / EDGESEP_LSTM_GROUP;
  const int64_t inputs = bytes ? (sizes->hidden + 3) / 4 : sizes->hidden;
  const Dims matrix = {groups, inputs, 4, EDGESEP_LSTM_GROUP * (bytes ? 4 : 1)};
  if (!in[1].given || sizes->hidden < 1 || recurrent != matrix)
    return "recurrent has shape " + text(recurrent) + ", expected " + text(matrix) + " for " +
           std::to_string(sizes->hidden) + " hidden" + (bytes ? " in eight bits" : "");
  sizes->sets = 1;
  if (in[4].given) {
    if (order.size() != 2 || order[0] < 1 || order[1] < 1)
      return "order has shape " + text(order) + ", expected (steps, sets)";
    sizes->sets = order[1];
  }
  if (!in[2].given || state.size() != 3 || state[1] < 1 || state[1] % sizes->sets)
    return "initial_h has shape " + text(state) + ", expected (1, " + std::to_string(sizes->sets) + " x rows, " +
           std::to_string(sizes->hidden) + ")";
  sizes->rows = state[1] / sizes->sets;
  int64_t count = 1;
  for (int64_t n : gates) count *= n;
  const int64_t frame = sizes->rows * 4 * sizes->hidden;
  if (gates.empty() || gates.back() != 4 * sizes->hidden || count < frame || count % frame)
    return "gates has shape " + text(gates) + ", expected (frames, " + std::to_string(sizes->rows) + " rows, " +
           std::to_string(4 * sizes->hidden) + ")";
  sizes->frames = count / frame;
  sizes->steps = in[4].given ? order[0] : sizes->frames;
  const Dims states = {1, state[1], sizes->hidden};
  return first_misfit(in, kLstmNames, kLstmRequired, {gates, recurrent, states, states, order, {groups, 4, EDGESEP_LSTM_GROUP}});
}

std::string check_windows(const std::vector<Input>& in, EdgesepWindows* sizes) {
  if (in.size() != kWindowInputs) return "WindowProduct takes 3 to 7 inputs, got " + std::to_string(in.size());
  const Dims&x = in[0].dims, &weight = in[1].dims, &bias = in[2].dims, &index = in[3].dims;
  const int64_t group = EDGESEP_WINDOW_GROUP;
  if (!in[2].given || bias.size() != 1 || bias[0] < 1) return "bias has shape " + text(bias) + ", expected (outputs)";
  sizes->outputs = bias[0];
  sizes->taps = weight.size() == 4 ? weight[1] : 0;
  const int64_t fast = EDGESEP_UNFOLDED_GROUP, taps = taps_of_parts(sizes->taps);
  const bool rounded = in[kWindowScale].given;
  sizes->unfolded = !rounded && taps && in[3].given && index.size() == 2 && index[1] == taps && weight[3] == fast &&
                    weight[0] == (bias[0] + fast - 1) / fast && weight[2] > 0;
  if (sizes->unfolded) sizes->taps = taps;
  const int64_t wide = rounded ? 4 * group : group;
  if (!sizes->unfolded && (!in[1].given || weight.size() != 4 || weight[0] != (bias[0] + group - 1) / group ||
                           weight[1] < 1 || weight[2] < 1 || weight[3] != wide))
    return "weight has shape " + text(weight) + ", expected (" + std::to_string((bias[0] + group - 1) / group) +
           " groups, taps, inputs" + (rounded ? " / 4, 256)" : ", 64)");
  sizes->inputs = weight[2] * (rounded ? 4 : 1);
  int64_t count = 1, added = 1;
  for (int64_t n : x) count *= n;
  if (!in[0].given || count < 1 || count % sizes->inputs)
    return "x has shape " + text(x) + ", expected rows of " + std::to_string(sizes->inputs);
  sizes->rows = count / sizes->inputs;
  if (in[3].given && (index.size() != 2 || index[0] < 1 || index[1] != sizes->taps))
    return "index has shape " + text(index) + ", expected (windows, " + std::to_string(sizes->taps) + ")";
  if (!in[3].given && sizes->taps != 1) return "index is missing: a window has " + std::to_string(sizes->taps) + " taps";
  sizes->windows = in[3].given ? index[0] : sizes->rows;
  for (int64_t n : in[5].dims) added *= n;
  if (in[5].given && added != sizes->windows * sizes->outputs)
    return "residual has shape " + text(in[5].dims) + ", expected (" + std::to_string(sizes->windows) + ", " +
           std::to_string(sizes->outputs) + ")";
  return first_misfit(in, kWindowNames, kWindowRequired, {x, weight, bias, index, bias, in[5].dims, bias});
}

std::string check_mamba(const std::vector<Input>& in, EdgesepMamba* sizes) {
  if (in.size() != kMambaInputs) return "BidirectionalMamba takes 12 or 15 inputs, got " + std::to_string(in.size());
  const Dims&x = in[0].dims, &conv = in[2].dims;
  const Dims&steps = in[5].dims, &A = in[7].dims;
  if (!in[0].given || x.size() != 3 || x[0] < 1 || x[1] < 1)
    return "x has shape " + text(x) + ", expected (rows, channels, length)";
  const auto groups = [](int64_t outputs, int64_t group) { return (outputs + group - 1) / group; };
  sizes->rows = x[0], sizes->channels = x[1], sizes->length = x[2];
  const bool bytes = in[kMambaScale].given;
  for (int i = kMambaScale; i < kMambaInputs; ++i)
    if (in[static_cast<size_t>(i)].given != bytes)
      return std::string(kMambaNames[i]) + (bytes ? " is missing" : " is there without in_scale");
  const Dims& through = in[10].dims;
  sizes->taps = through.size() == 4 ? taps_of_parts(through[1]) : 0;
  if (!sizes->taps) return "through has shape " + text(through) + ", expected (groups, 9 or 27, channels, 32)";
  if (x[2] < sizes->taps)
    return "x has shape " + text(x) + ", expected " + std::to_string(sizes->taps) + " steps or more";
  if (!in[2].given || conv.size() != 3 || conv[1] < 1 || conv[2] < 1 || conv[2] > EDGESEP_CONV_MAX_TAPS)
    return "conv_weight has shape " + text(conv) + ", expected (2, inner, 1 to 8)";
  sizes->inner = conv[1], sizes->conv_taps = conv[2];
  if (!in[5].given || steps.size() != 5 || steps[3] < 1)
    return "steps has shape " + text(steps) + ", expected (2, groups, 1, rank, 64)";
  if (!in[7].given || A.size() != 3 || A[2] < 1 || A[2] > EDGESEP_SCAN_MAX_STATE)
    return "A has shape " + text(A) + ", expected (2, " + std::to_string(conv[1]) + ", 1 to 64)";
  sizes->rank = steps[3], sizes->state = A[2];
  const int64_t inner = conv[1], outputs = sizes->taps * x[1], parts = through[1], group = EDGESEP_WINDOW_GROUP;
  const int64_t unfolded = EDGESEP_UNFOLDED_GROUP, numbers = sizes->pairs ? 2 : 1;
  if (bytes && sizes->pairs) return "either bfloat16 or eight bits: there are scales and bf16 is set";
  if (x[1] % numbers || inner % numbers)
    return "bfloat16 takes an even number of channels, got " + std::to_string(x[1]) + " and " + std::to_string(inner);
  if (bytes && inner % 4) return "eight bits take a multiple of 4 inner channels, got " + std::to_string(inner);
  const int64_t mixed = sizes->rank + 2 * sizes->state, rows = inner / (bytes ? 4 : numbers);
  const int64_t side_by_side = bytes ? 4 * group : group;
  const Dims in_bytes = {2, 2, groups(inner, group), 1, outputs / 4, side_by_side};
  const Dims each = {2, inner};
  return first_misfit(in, kMambaNames, kMambaRequired,
                      {x,
                       bytes ? in_bytes : Dims{2, 2, groups(inner, unfolded), parts, x[1] / numbers, unfolded},
                       {2, inner, conv[2]},
                       each,
                       {2, groups(mixed, group), 1, rows, side_by_side},
                       {2, groups(inner, group), 1, sizes->rank, group},
                       each,
                       {2, inner, sizes->state},
                       each,
                       {2, groups(outputs, group), 1, rows, side_by_side},
                       {groups(outputs, unfolded), parts, x[1] / numbers, unfolded},
                       {x[1]},
                       {2, 2, inner},
                       {2, mixed},
                       {2, outputs}});
}

std::string check_index(const int64_t* index, int64_t count, int64_t size, int64_t low) {
  for (int64_t i = 0; i < count; ++i)
    if (index[i] < low || index[i] >= size)
      return "index holds " + std::to_string(index[i]) + ", expected " + std::to_string(low) + " to " +
             std::to_string(size - 1);
  return "";
}

}  // namespace edgesep
