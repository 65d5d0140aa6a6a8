// A whole encoder layer for inference: y = LN(h + W2 gelu(W1 h)), h = LN(x + Wo attention(x Wqkv)), no dropout.
//
// The batch passes in chunks of whole sequences, so that what the layer keeps between its steps stays in the caches and the
// memory in use does not grow with the batch (fresh pages from the system would cost a quarter of a matmul's time). Within a
// chunk a thread takes a block of rows from the attention's output to the end of the layer, with everything between them in
// its own cache. A chunk with too few rows for that is cut by columns, step by step.

#include <time.h>

#include <type_traits>
#include <vector>

#include "cpu/encoder_plan.h"
#include "cpu/layer_norm.h"
#include "cpu/packed_linear.h"
#include "cpu/quantize_row.h"
#include "cpu/vec_math.h"

namespace fastbert::cpu::FASTBERT_ISA {

namespace {

enum Work { kLinear, kAttention, kRest, kWorks };

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

// What one thread spends in a layer, which is added to the counters of all threads at the end: reading the clock for each
// piece takes 4% of a short request, and a counter that threads share as much again.
class Times {
 public:
  explicit Times(const EncoderLayerParams& p) : counters_(p.nanoseconds) {}
  Times(const Times&) = delete;
  ~Times() {
    if (counters_ == nullptr) return;
    for (int work = 0; work < kWorks; ++work) __atomic_fetch_add(counters_ + work, spent_[work], __ATOMIC_RELAXED);
  }

 private:
  friend class Stopwatch;

  int64_t* counters_;
  int64_t spent_[kWorks] = {};
};

// Adds the nanoseconds of its life to those of its thread, where anybody counts them.
class Stopwatch {
 public:
  Stopwatch(Times& times, Work work)
      : spent_(times.counters_ == nullptr ? nullptr : times.spent_ + work), start_(spent_ == nullptr ? 0 : now()) {}
  Stopwatch(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (spent_ != nullptr) *spent_ += now() - start_;
  }

 private:
  int64_t* spent_;
  int64_t start_;
};

// The dtypes of a layer: of its weights, of what enters and leaves it, and of what stays inside.
template <typename GroupType, typename HiddenType, typename InnerType>
struct Precision {
  using Group = GroupType;
  using Hidden = HiddenType;
  using Inner = InnerType;
  using Element = typename Group::Element;  // of what enters a linear layer
  // Whether rows of T become another dtype before a linear layer can read them.
  template <typename T>
  static constexpr bool kConverts = !std::is_same_v<T, Element>;
};

// The rows of a chunk that one set of buffers holds, and the steps of the layer on some of them (first, last: counted from
// the first of them) and on some panels of the weights.
template <typename P>
struct Rows {
  using Hidden = typename P::Hidden;
  using Inner = typename P::Inner;
  using Group = typename P::Group;
  using Element = typename P::Element;

  const EncoderLayerParams& p;
  Times& times;
  const EncoderBuffers& buffers;
  const Hidden* x;
  Inner* qkv;
  Inner* context;
  Hidden* y;
  Hidden* h = static_cast<Hidden*>(buffers.h);
  Inner* inner = static_cast<Inner*>(buffers.inner);
  int64_t hidden = p.qkv.in_features, wide = p.output.in_features;

  template <typename T>
  void enter(const T* from, int64_t columns, int64_t first, int64_t last) const {
    if constexpr (P::template kConverts<T>) {
      const Stopwatch watch(times, kRest);
      for (int64_t row = first; row < last; ++row) {
        const T* from_row = from + row * columns;
        Element* to = static_cast<Element*>(buffers.converted) + row * columns;
        if constexpr (kQuantizes<Group>) {
          buffers.scales[row] = quantize_row(from_row, columns, to);
        } else {
          for_columns(columns,
                      [&](int64_t column, auto extent) { store(to + column, load(from_row + column, extent), extent); });
        }
      }
    }
  }

  template <typename T, typename Finish>
  void linear(const PackedLinear& layer, const T* from, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
              void* sums, const Finish& finish) const {
    const Stopwatch watch(times, kLinear);
    const int64_t row_bytes = layer.in_features * static_cast<int64_t>(sizeof(Element));
    const void* rows = P::template kConverts<T> ? buffers.converted : static_cast<const void*>(from);
    const LeftMatrixRows left{static_cast<const char*>(rows) + first * row_bytes, row_bytes,
                              kQuantizes<Group> ? buffers.scales + first : nullptr};
    packed_linear<Group>(last - first, left, layer, first_panel, last_panel, sums, finish);
  }

  void project_qkv(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, void* sums) const {
    linear(p.qkv, x, first, last, first_panel, last_panel, sums, store_rows(qkv + first * 3 * hidden, 3 * hidden));
  }

  void project_context(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, void* sums) const {
    to_z(p.attention_output, context, first, last, first_panel, last_panel, sums);
  }

  void activate(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, void* sums) const {
    Inner* to = inner + first * wide;
    linear(p.intermediate, h, first, last, first_panel, last_panel, sums,
           [to, stride = wide](int64_t row, int64_t column, Vec v, auto extent) {
             store(to + row * stride + column, activation(v), extent);
           });
  }

  void project_inner(int64_t first, int64_t last, int64_t first_panel, int64_t last_panel, void* sums) const {
    to_z(p.output, inner, first, last, first_panel, last_panel, sums);
  }

  void normalise_attention(int64_t first, int64_t last) const {
    add_norm(first, last, x, p.attention_norm_weight, p.attention_norm_bias, p.attention_norm_eps, h);
  }

  void normalise_output(int64_t first, int64_t last) const {
    add_norm(first, last, h, p.output_norm_weight, p.output_norm_bias, p.output_norm_eps, y);
  }

 private:
  static FASTBERT_INLINE Vec activation(Vec v) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(Inner) == 2) return gelu_for_bfloat16(v);
#endif
    return gelu(v, normal_distribution(v));
  }

  template <typename T>
  void to_z(const PackedLinear& layer, const T* from, int64_t first, int64_t last, int64_t first_panel, int64_t last_panel,
            void* sums) const {
    linear(layer, from, first, last, first_panel, last_panel, sums, store_rows(buffers.z + first * hidden, hidden));
  }

  void add_norm(int64_t first, int64_t last, const Hidden* residual, const float* weight, const float* bias, float eps,
                Hidden* to) const {
    const Stopwatch watch(times, kRest);
    for (int64_t row = first; row < last; ++row) {
      float* z = buffers.z + row * hidden;
      const Hidden* residual_row = residual + row * hidden;
      Vec sums{};
      for_columns(hidden, [&](int64_t column, auto extent) {
        const Vec v = load(z + column, extent) + load(residual_row + column, extent);
        sums += v;
        store(z + column, v, extent);
      });
      normalise_row(z, hidden, row_moments(z, hidden, sums, eps), weight, bias, to + row * hidden);
    }
  }
};

constexpr int64_t kPiecesPerThread = 16;

// Pieces of the panels of a weight: as many for each thread and, where that divides them, of the same size, because threads
// that take turns at pieces of 4 and 5 panels end a ninth apart.
int64_t count_column_pieces(int64_t panels, int num_threads) {
  if (num_threads == 1) return 1;
  for (int64_t per_thread = kPiecesPerThread; per_thread > 0; --per_thread) {
    if (panels % (per_thread * num_threads) == 0) return per_thread * num_threads;
  }
  return panels;
}

// Runs body(first, last, first_panel, last_panel, sums) on rows x panels, cut into a few pieces for each thread.
template <typename Body>
void for_pieces(int64_t rows, int64_t out_features, int num_threads, const Body& body) {
  const int64_t panels = count_panels(out_features), column_pieces = count_column_pieces(panels, num_threads);
  const int64_t wanted = column_pieces % num_threads == 0 ? column_pieces : kPiecesPerThread * num_threads;
  const int64_t row_pieces_wanted = (wanted + column_pieces - 1) / column_pieces, most = rows / kFewestRows;
  const int64_t row_pieces = row_pieces_wanted < most ? row_pieces_wanted : most > 0 ? most : 1;
  parallel_shares(column_pieces * row_pieces, num_threads, [&](int64_t piece) {
    const int64_t column_piece = piece / row_pieces, row_piece = piece % row_pieces;
    void* sums = thread_scratch(kSumVectors * kWidth);
    body(row_piece * rows / row_pieces, (row_piece + 1) * rows / row_pieces, column_piece * panels / column_pieces,
         (column_piece + 1) * panels / column_pieces, sums);
  });
}

template <typename P>
void run_rows_by_block(const Rows<P>& all, int64_t rows, int64_t blocks, int num_threads, bool after_attention) {
  const EncoderLayerParams& p = all.p;
  parallel_for(blocks, num_threads, [&](int64_t block) {
    const int64_t first = first_row_of(block, blocks, rows), count = first_row_of(block + 1, blocks, rows) - first;
    Memory measure(nullptr);
    EncoderBuffers(measure, p, count);
    Memory memory(thread_scratch(kSumVectors * kWidth + static_cast<size_t>(measure.used()) / sizeof(float)));
    void* sums = memory.take(kSumVectors * sizeof(Vec));
    const EncoderBuffers buffers(memory, p, count);
    const int64_t hidden = all.hidden;
    const Rows<P> mine{p,
                       all.times,
                       buffers,
                       all.x + first * hidden,
                       all.qkv + first * 3 * hidden,
                       all.context + first * hidden,
                       all.y + first * hidden};
    if (!after_attention) {
      mine.enter(mine.x, hidden, 0, count);
      mine.project_qkv(0, count, 0, count_panels(p.qkv.out_features), sums);
      return;
    }
    mine.enter(mine.context, hidden, 0, count);
    mine.project_context(0, count, 0, count_panels(hidden), sums);
    mine.normalise_attention(0, count);
    mine.enter(mine.h, hidden, 0, count);
    mine.activate(0, count, 0, count_panels(mine.wide), sums);
    mine.enter(mine.inner, mine.wide, 0, count);
    mine.project_inner(0, count, 0, count_panels(hidden), sums);
    mine.normalise_output(0, count);
  });
}

template <typename P>
void run_rows_by_column(const Rows<P>& all, int64_t rows, int num_threads, bool after_attention) {
  const EncoderLayerParams& p = all.p;
  const int64_t hidden = all.hidden;
  const auto for_some_rows = [&](const auto& body) {
    const int64_t pieces = rows < kPiecesPerThread * num_threads ? rows : kPiecesPerThread * num_threads;
    parallel_shares(pieces, num_threads, [&](int64_t piece) { body(piece * rows / pieces, (piece + 1) * rows / pieces); });
  };
  const auto enter = [&](const auto* from, int64_t columns) {
    if constexpr (P::template kConverts<std::remove_cv_t<std::remove_pointer_t<decltype(from)>>>) {
      for_some_rows([&](int64_t first, int64_t last) { all.enter(from, columns, first, last); });
    }
  };
  if (!after_attention) {
    enter(all.x, hidden);
    for_pieces(rows, p.qkv.out_features, num_threads, [&](auto... piece) { all.project_qkv(piece...); });
    return;
  }
  enter(all.context, hidden);
  for_pieces(rows, hidden, num_threads, [&](auto... piece) { all.project_context(piece...); });
  for_some_rows([&](int64_t first, int64_t last) {
    all.normalise_attention(first, last);
    all.enter(all.h, hidden, first, last);
  });
  for_pieces(rows, all.wide, num_threads, [&](auto... piece) { all.activate(piece...); });
  enter(all.inner, all.wide);
  for_pieces(rows, hidden, num_threads, [&](auto... piece) { all.project_inner(piece...); });
  for_some_rows([&](int64_t first, int64_t last) { all.normalise_output(first, last); });
}

template <typename P>
void run_chunk(const EncoderLayerParams& p, Times& times, const EncoderWorkspace& workspace, const int32_t* cu_seqlens,
               int64_t sequences, int64_t start, int64_t rows, int num_threads) {
  using Inner = typename P::Inner;
  const int64_t hidden = p.qkv.in_features, blocks = count_row_blocks(rows, num_threads);
  const Rows<P> all{p,
                    times,
                    workspace.buffers,
                    static_cast<const typename P::Hidden*>(p.x) + start * hidden,
                    static_cast<Inner*>(workspace.qkv),
                    static_cast<Inner*>(workspace.context),
                    static_cast<typename P::Hidden*>(p.y) + start * hidden};
  const auto run = [&](bool after_attention) {
    blocks > 0 ? run_rows_by_block(all, rows, blocks, num_threads, after_attention)
               : run_rows_by_column(all, rows, num_threads, after_attention);
  };
  run(false);
  {
    const Stopwatch watch(times, kAttention);
    constexpr DType inner = sizeof(Inner) == 2 ? DType::bfloat16 : DType::float32;
    attention_forward({workspace.qkv, cu_seqlens, workspace.context, nullptr, rows, sequences, p.num_heads, p.head_dim,
                       p.softmax_scale, Dropout{}, inner},
                      num_threads);
  }
  run(true);
}

template <typename P>
void run_layer(const EncoderLayerParams& p, int num_threads) {
  Times times(p);
  const EncoderChunks chunks(p, num_threads);
  Memory memory(p.workspace);
  const EncoderWorkspace workspace(memory, p, chunks.longest(), num_threads);
  std::vector<int32_t> cu_seqlens(p.batch + 1);  // of this thread alone: another one may be chunks ahead
  for (int64_t chunk = 0; chunk < chunks.size(); ++chunk) {
    const int64_t first = chunks.first_sequence(chunk), sequences = chunks.first_sequence(chunk + 1) - first;
    const int64_t start = p.cu_seqlens[first], rows = p.cu_seqlens[first + sequences] - start;
    if (rows == 0) continue;
    for (int64_t i = 0; i <= sequences; ++i) {
      cu_seqlens[i] = p.cu_seqlens[first + i] - static_cast<int32_t>(start);
    }
    run_chunk<P>(p, times, workspace, cu_seqlens.data(), sequences, start, rows, num_threads);
  }
}

}  // namespace

void pack_weight(const PackWeightParams& p, int num_threads) {
  uint32_t* packed = static_cast<uint32_t*>(p.packed);
  const auto pack = [&](auto group, const auto* weight) {
    pack_panels<decltype(group)>(weight, p.out_features, p.in_features, packed, num_threads);
  };
  if (p.dtype == DType::float32) return pack(FloatGroup(), static_cast<const float*>(p.weight));
  if (p.dtype == DType::bfloat16) return pack(BFloat16Group(), static_cast<const BFloat16*>(p.weight));
  pack(Int8Group(), static_cast<const int8_t*>(p.weight));
}

void encoder_layer(const EncoderLayerParams& p, int num_threads) {
  // What is inside of a layer whose weights are not float32: what the linear layers of bfloat16 read.
  using Inner = BFloat16Group::Element;
  if (p.weight_dtype == DType::float32) return run_layer<Precision<FloatGroup, float, float>>(p, num_threads);
  if (p.weight_dtype == DType::bfloat16) {
    return p.dtype == DType::float32 ? run_layer<Precision<BFloat16Group, float, Inner>>(p, num_threads)
                                     : run_layer<Precision<BFloat16Group, BFloat16, Inner>>(p, num_threads);
  }
  p.dtype == DType::float32 ? run_layer<Precision<Int8Group, float, Inner>>(p, num_threads)
                            : run_layer<Precision<Int8Group, BFloat16, Inner>>(p, num_threads);
}

}  // namespace fastbert::cpu::FASTBERT_ISA
