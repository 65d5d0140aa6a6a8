// Chooses the instruction set, and forwards each launcher to the kernels compiled for it.

#include "cpu/dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && !defined(FASTBERT_WITHOUT_avx512_bf16) && \
    !defined(FASTBERT_WITHOUT_avx512_amx)
#define FASTBERT_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <stdexcept>

#include "cpu/kernels.h"

namespace fastbert::cpu {

namespace {

struct InstructionSet {
  const char* name;
  bool multiplies_bfloat16, multiplies_int8;  // in an instruction that adds the products
#define FASTBERT_TABLE_ENTRY(kernel, Params) void (*kernel)(const Params&, int);
  FASTBERT_FOR_EACH_KERNEL(FASTBERT_TABLE_ENTRY)
};

#define FASTBERT_TABLE_VALUE(kernel, Params) isa::kernel,

const InstructionSet baseline_set = [] {
  namespace isa = baseline;
  return InstructionSet{"baseline", false, false, FASTBERT_FOR_EACH_KERNEL(FASTBERT_TABLE_VALUE)};
}();

#if defined(__x86_64__)
const InstructionSet avx2_set = [] {
  namespace isa = avx2;
  return InstructionSet{"avx2", false, false, FASTBERT_FOR_EACH_KERNEL(FASTBERT_TABLE_VALUE)};
}();

const InstructionSet avx512_set = [] {
  namespace isa = avx512;
  return InstructionSet{"avx512", false, false, FASTBERT_FOR_EACH_KERNEL(FASTBERT_TABLE_VALUE)};
}();

// The same set with VNNI.
#define FASTBERT_VNNI_SET(set_name, base_set)    \
  const InstructionSet set_name##_set = [] {     \
    InstructionSet set = base_set;               \
    set.name = #set_name;                        \
    set.multiplies_int8 = true;                  \
    set.pack_weight = set_name::pack_weight;     \
    set.encoder_layer = set_name::encoder_layer; \
    return set;                                  \
  }();

#if !defined(FASTBERT_WITHOUT_avx2_vnni)
FASTBERT_VNNI_SET(avx2_vnni, avx2_set)

bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 4) != 0;
}
#endif

#if !defined(FASTBERT_WITHOUT_avx512_vnni)
FASTBERT_VNNI_SET(avx512_vnni, avx512_set)
#endif

#if !defined(FASTBERT_WITHOUT_avx512_bf16)
const InstructionSet avx512_bf16_set = [] {
  namespace isa = avx512_bf16;
  return InstructionSet{"avx512_bf16", true, true, FASTBERT_FOR_EACH_KERNEL(FASTBERT_TABLE_VALUE)};
}();
#endif

#if defined(FASTBERT_AMX)
const InstructionSet avx512_amx_set = [] {
  InstructionSet set = avx512_bf16_set;
  set.name = "avx512_amx";
#define FASTBERT_TAKE_KERNEL(kernel, Params) set.kernel = avx512_amx::kernel;
  FASTBERT_FOR_EACH_KERNEL_OF_TILES(FASTBERT_TAKE_KERNEL)
  return set;
}();

// Whether the CPU has AMX for bfloat16 and int8 and the operating system, which is asked for it once for the whole process,
// keeps the tiles of its threads: Linux documents that in Documentation/arch/x86/xstate.rst.
bool may_use_amx() {
  constexpr unsigned bits = 1u << 22 | 1u << 24 | 1u << 25;  // amx_bf16, amx_tile, amx_int8
  constexpr int arch_req_xcomp_perm = 0x1023, tile_data = 18;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & bits) != bits) return false;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
}
#endif
#endif

// Those that this CPU and its operating system support, from the narrowest to the widest.
std::vector<const InstructionSet*> supported_sets() {
  std::vector<const InstructionSet*> sets{&baseline_set};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2_set);
#if !defined(FASTBERT_WITHOUT_avx2_vnni)
    if (has_avx_vnni()) sets.push_back(&avx2_vnni_set);
#endif
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      sets.push_back(&avx512_set);
#if !defined(FASTBERT_WITHOUT_avx512_vnni)
      if (__builtin_cpu_supports("avx512vnni")) sets.push_back(&avx512_vnni_set);
#endif
#if !defined(FASTBERT_WITHOUT_avx512_bf16)
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        sets.push_back(&avx512_bf16_set);
#if defined(FASTBERT_AMX)
        if (may_use_amx()) sets.push_back(&avx512_amx_set);
#endif
      }
#endif
    }
  }
#endif
  return sets;
}

const InstructionSet* current = supported_sets().back();

bool is_activation(DType dtype) { return dtype == DType::float32 || dtype == DType::bfloat16; }

bool is_weight(DType dtype) { return is_activation(dtype) || dtype == DType::int8; }

template <typename Params>
void require_supported(const Params& params) {
  if (!is_activation(params.dtype)) {
    throw std::invalid_argument("the CPU kernels take float32 and bfloat16");
  }
}

void require_supported(const PackWeightParams& params) {
  if (!is_weight(params.dtype)) throw std::invalid_argument("weights of float32, bfloat16 and int8 are packed");
}

void require_supported(const MatmulParams& params) {
  const bool gelu_of_half = params.end != MatmulEnd::product && params.dtype != DType::float32;
  if (!multiplies(params.dtype) || params.dtype == DType::int8 || gelu_of_half) {
    throw std::invalid_argument("this instruction set has no matmul of this dtype");
  }
  if (params.row_sums != nullptr && params.a_row_stride != 1 && params.rows > 1) {
    throw std::invalid_argument("the sums of rows come with an A whose columns are contiguous");
  }
}

void require_packed_for_this(const PackedLinear& linear) {
  if (linear.instruction_set != current->name) {
    throw std::invalid_argument(std::string("these weights are packed for the instruction set ") + linear.instruction_set +
                                ", the one in use is " + current->name);
  }
}

void require_supported(const PackedDenseParams& params) {
  require_packed_for_this(params.linear);
  if (!is_activation(params.dtype)) {
    throw std::invalid_argument("packed linear layers are float32 or bfloat16");
  }
}

void require_supported(const EncoderLayerParams& params) {
  for (const PackedLinear* linear : {&params.qkv, &params.attention_output, &params.intermediate, &params.output})
    require_packed_for_this(*linear);
  const bool wider = params.weight_dtype == DType::float32 && params.dtype != DType::float32;
  if (!is_weight(params.weight_dtype) || !is_activation(params.dtype) || wider) {
    throw std::invalid_argument("there is no encoder layer for these dtypes");
  }
}

int64_t matmul_panel_bytes(int64_t depth, DType dtype) {
  return kMatmulPanelColumns * (dtype == DType::float32 ? depth * 4 : (depth + 1) / 2 * 4);
}

}  // namespace

std::vector<std::string> supported_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : supported_sets()) names.push_back(set->name);
  return names;
}

const char* instruction_set() { return current->name; }

void set_instruction_set(const std::string& name) {
  std::string names;
  for (const InstructionSet* set : supported_sets()) {
    if (set->name == name) {
      current = set;
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("no instruction set '" + name + "' here: this CPU supports " + names);
}

bool multiplies(DType dtype) {
  return dtype == DType::float32 || (dtype == DType::bfloat16 && current->multiplies_bfloat16) ||
         (dtype == DType::int8 && current->multiplies_int8);
}

int64_t packed_weight_bytes(int64_t out_features, int64_t in_features, DType dtype) {
  constexpr int64_t panel = 64;  // no instruction set packs more rows of a weight side by side
  const int64_t bytes = dtype == DType::float32 ? 4 : dtype == DType::int8 && multiplies(DType::int8) ? 1 : 2;
  return (out_features + panel - 1) / panel * panel * in_features * bytes;
}

int64_t matmul_chunk_columns(int64_t depth, int64_t columns, DType dtype) {
  // At BERT's widths 13 MB for 2,048 tokens, which a last-level cache holds; malloc keeps no more than 32 MB for the next
  // call.
  constexpr int64_t most_panels = 1536 / kMatmulPanelColumns, most_bytes = int64_t{30} << 20;
  const int64_t panels = (columns + kMatmulPanelColumns - 1) / kMatmulPanelColumns;
  const int64_t most = std::clamp<int64_t>(most_bytes / matmul_panel_bytes(depth, dtype), 1, most_panels);
  const int64_t chunks = (panels + most - 1) / most;
  return (panels + chunks - 1) / chunks * kMatmulPanelColumns;
}

int64_t matmul_workspace_bytes(int64_t depth, int64_t columns, DType dtype) {
  return matmul_chunk_columns(depth, columns, dtype) / kMatmulPanelColumns * matmul_panel_bytes(depth, dtype);
}

int64_t row_chunks(int64_t rows) {
  constexpr int64_t max_chunks = 64, min_rows = 16;
  return std::clamp<int64_t>((rows + min_rows - 1) / min_rows, 1, max_chunks);
}

#define FASTBERT_LAUNCHER(kernel, Params)              \
  void kernel(const Params& params, int num_threads) { \
    require_supported(params);                         \
    current->kernel(params, num_threads);              \
  }
FASTBERT_FOR_EACH_KERNEL(FASTBERT_LAUNCHER)

}  // namespace fastbert::cpu
