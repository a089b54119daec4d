// The closed set of TurboMind objects (lmdeploy 0.11.0) that the patches look into, and the functions
// that they hook.
//
// Facts only: names, order and offsets, which are the same in the wheels of CPython 3.10 to 3.13 and
// were read from their debug information. The wheels are built by GCC with the old string ABI; no
// hooked signature has a string in it. selftest.cc proves what it can of this before anything is
// patched, and the checksum of the library stands for the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace sagec::tm {

using BlockIds = std::vector<int>;
using UniqueIds = std::vector<std::uint64_t>;
using Tokens = std::vector<int>;

enum Status : int { kCached = 0, kLocked = 1, kActive = 2 };

// turbomind::Sequence. cache_len: tokens whose KV is in the blocks; input_length: to compute now.
struct Sequence {
    std::uint64_t id;
    int status;
    BlockIds blocks;
    UniqueIds block_unique_ids;
    int input_length;
    Tokens prompt, tokens;
    int cache_len;
    std::vector<std::byte> random_state;
    float rope_theta;
    std::vector<std::vector<std::byte>> input_embeddings;
    std::vector<std::pair<int, int>> input_embedding_ranges;
};
static_assert(sizeof(Sequence) == 208 && offsetof(Sequence, blocks) == 16 &&
              offsetof(Sequence, input_length) == 64);
static_assert(offsetof(Sequence, prompt) == 72 && offsetof(Sequence, tokens) == 96);
static_assert(offsetof(Sequence, cache_len) == 120 && offsetof(Sequence, rope_theta) == 152);

// turbomind::Block. unique_id changes whenever the block gets new content.
struct Block {
    int id, use_count;
    std::uint64_t unique_id, timestamp;
    void *data;
};
static_assert(sizeof(Block) == 32 && offsetof(Block, data) == 24);

// turbomind::core::Allocator, passed by value: its copies are not trivial.
struct Allocator {
    std::shared_ptr<void> impl;
};

// turbomind::BlockManager. The three lists of ids are sorted.
struct BlockManager {
    std::size_t block_size;
    int max_block_count, chunk_size;
    Allocator allocator;
    std::vector<void *> chunks;
    BlockIds active, cached, free;
    std::vector<Block> blocks;
    std::uint64_t next_unique_id, next_timestamp;
};
static_assert(sizeof(BlockManager) == 168 && offsetof(BlockManager, active) == 56);
static_assert(offsetof(BlockManager, blocks) == 128 && offsetof(BlockManager, next_timestamp) == 160);

// turbomind::BlockTrie, its first member.
struct BlockTrie {
    std::size_t block_seq_len;
};

// turbomind::SequenceManager. block_trie is null where prefix caching is off.
struct SequenceManager {
    int block_seq_len, rank, attn_cp_size;
    std::map<std::uint64_t, Sequence> sequences;
    std::shared_ptr<BlockManager> block_manager;
    std::shared_ptr<BlockTrie> block_trie;
    BlockIds unlocked, freed;
};
static_assert(sizeof(SequenceManager) == 144 && offsetof(SequenceManager, block_manager) == 64);
static_assert(offsetof(SequenceManager, block_trie) == 80 && offsetof(SequenceManager, freed) == 120);

// turbomind::Snapshot, what BlockManager::TakeSnapshot returns.
struct Snapshot {
    int active, cached, free;
    std::vector<int> use_count;
};
static_assert(sizeof(Snapshot) == 40);

// turbomind::SequenceManager::Outcome, returned in two registers.
struct Outcome {
    int allocation, swap_in, swap_out;
};

// turbomind::SequenceManager::BlockConfig.
struct BlockConfig {
    int head_dim, head_num, block_len, t_bits, q_bits;
};

// turbomind::core::Buffer and Tensor.
struct Buffer {
    std::shared_ptr<void> data;
    std::ptrdiff_t base, size; // in elements
    int device_type, device_id, dtype, pad;

    template <class T> T *as() const { return static_cast<T *>(data.get()) + base; }
};
static_assert(sizeof(Buffer) == 48);

struct Tensor {
    std::vector<std::ptrdiff_t> shape, stride;
    std::ptrdiff_t size;
    Buffer buffer;
};
static_assert(sizeof(Tensor) == 104 && offsetof(Tensor, buffer) == 56);

// turbomind::Request, as far as it is looked at.
struct Request {
    std::uint64_t id, unique_id;
    std::byte unused[312];
    Tensor output_ids; // host memory: prompt and output, written when a step ends
    std::byte rest[232];
};
static_assert(sizeof(Request) == 664 && offsetof(Request, output_ids) == 328);

// turbomind::BatchState: the slots of a batch. A finished request leaves a null behind.
struct BatchState {
    std::byte unused0[48];
    Buffer h_context_length; // int, host memory
    std::byte unused1[536];
    std::vector<Sequence *> sequences;
    std::vector<std::shared_ptr<Request>> requests;
    std::vector<int> errors;
    int active_size, size; // the active ones come first
};
static_assert(sizeof(BatchState) == 712 && offsetof(BatchState, h_context_length) == 48);
static_assert(offsetof(BatchState, sequences) == 632 && offsetof(BatchState, active_size) == 704);

// turbomind::GenerationState. partial: 1 where the last active sequence does not finish its context,
// whose full length is then kept in partial_context_length until the step ends.
struct GenerationState {
    int max_init_ctx_len, step, partial, partial_context_length;
    std::vector<std::uint64_t> unique_ids;
    bool skip_init_sampling;
    std::deque<int> min_input_count;
    int finished_count;
};
static_assert(sizeof(GenerationState) == 136 && offsetof(GenerationState, unique_ids) == 16);
static_assert(offsetof(GenerationState, finished_count) == 128);

// turbomind::LlamaBatch, as far as it is looked at: one a rank, on a thread of its own.
struct LlamaBatch {
    std::byte unused0[104];
    void *gateway;
    std::byte unused1[32];
    int dp_rank, tp_size, tp_rank;
    std::byte unused2[12];
    void *stream; // cudaStream_t
    std::byte unused3[32];
    SequenceManager *sequence_manager;
    std::byte unused4[4136];
    BatchState *state, *back, *incoming;
};
static_assert(offsetof(LlamaBatch, gateway) == 104 && offsetof(LlamaBatch, dp_rank) == 144);
static_assert(offsetof(LlamaBatch, stream) == 168 && offsetof(LlamaBatch, sequence_manager) == 208);
static_assert(offsetof(LlamaBatch, state) == 4352 && offsetof(LlamaBatch, incoming) == 4368);

using Sequences = std::vector<const Sequence *>;
using AdjustInputCount = std::function<int(const Sequences &, const std::vector<int> &)>;
using GetFreeBytes = std::function<std::size_t()>;

} // namespace sagec::tm

// The hooked functions, by mangled name; a name says neither whether it is static nor what it returns.
#define SAGEC_SM "_ZN9turbomind15SequenceManager"
#define SAGEC_BM "_ZN9turbomind12BlockManager"
#define SAGEC_LB "_ZN9turbomind10LlamaBatch"

namespace sagec::tm::names {
// SequenceManager (not static, but for the constructor all take `this` first)
inline constexpr char kMaterialize[] = SAGEC_SM
    "11MaterializeESt6vectorIPKNS_8SequenceESaIS4_EES1_IiSaIiEERKS1_ImSaImEEiSt8functionIFiRKS6_RKS8_EE";
inline constexpr char kCountRequiredBlocks[] =
    SAGEC_SM "19CountRequiredBlocksERKSt6vectorIPKNS_8SequenceESaIS4_EERKS1_IiSaIiEEi";
inline constexpr char kPrefixMatch[] = SAGEC_SM "11PrefixMatchERSt6vectorIPKNS_8SequenceESaIS4_EE";
inline constexpr char kCachePrompt[] = SAGEC_SM "11CachePromptERKSt6vectorIPKNS_8SequenceESaIS4_EEi";
inline constexpr char kCacheGeneration[] = SAGEC_SM "15CacheGenerationERKNS_8SequenceE";
inline constexpr char kCreate[] = SAGEC_SM "6CreateEm";
inline constexpr char kErase[] = SAGEC_SM "5EraseEm";
inline constexpr char kUpdateAndSetUnlock[] = SAGEC_SM "18UpdateAndSetUnlockERKNS_8SequenceE";
inline constexpr char kSequenceManager[] =
    SAGEC_SM "C1EmRKNS0_11BlockConfigEdibiiNS_4core9AllocatorESt8functionIFmvEE";
// BlockManager
inline constexpr char kEvict[] = SAGEC_BM "5EvictEi";
inline constexpr char kVerify[] = SAGEC_BM "6VerifyERKSt6vectorIiSaIiEERKS1_ImSaImEE";
inline constexpr char kAllocate[] = SAGEC_BM "8AllocateEi";
inline constexpr char kTakeSnapshot[] = SAGEC_BM "12TakeSnapshotEv";
// BlockTrie
inline constexpr char kTrieCache[] = "_ZN9turbomind9BlockTrie5CacheERKNS_8SequenceERKSt6vectorIiSaIiEE";
inline constexpr char kTrieVerify[] = "_ZN9turbomind9BlockTrie6VerifyEv";
// LlamaBatch
inline constexpr char kInitialize[] = SAGEC_LB "10InitializeERNS_15GenerationStateE";
inline constexpr char kFinish[] =
    SAGEC_LB "6FinishERNS_15GenerationStateERSt6vectorISt8functionIFvvEESaIS6_EE";
// others
inline constexpr char kAllocator[] = "_ZN9turbomind4core9AllocatorC1ENS_10DeviceTypeE";
} // namespace sagec::tm::names

#undef SAGEC_SM
#undef SAGEC_BM
#undef SAGEC_LB
