// Before anything is patched: do TurboMind's objects look as abi.h says? A throw-away SequenceManager in
// host memory is driven through a life of a sequence, and looked at through our declarations.
#include <algorithm>
#include <cstring>
#include <new>

#include "hooks.h"

namespace sagec::tm {

namespace {

constexpr int kBlockTokens = 16, kNumBlocks = 4, kRank = 3, kHeadDim = 8;
constexpr std::size_t kBlockBytes = kBlockTokens * kHeadDim * 2 * 2; // keys and values of 2 bytes
constexpr std::uint64_t kSession = 0x334455667788;                   // nobody's of ours
constexpr unsigned char kCanary = 0x5a;

struct Calls {
    Original<void(void *, std::size_t, const BlockConfig &, double, int, bool, int, int, Allocator,
                  GetFreeBytes)>
        construct;
    Original<void(Allocator *, int)> construct_allocator;
    Original<const Sequence *(SequenceManager *, std::uint64_t)> create;
    Original<Outcome(SequenceManager *, Sequences, std::vector<int>, const std::vector<std::uint64_t> &, int,
                     AdjustInputCount)>
        materialize;
    Original<void(SequenceManager *, const Sequence &)> unlock;
    Original<void(BlockManager *, int)> evict;
    Original<Snapshot(BlockManager *)> take_snapshot;
    Original<bool(SequenceManager *, std::uint64_t)> erase;
};

// "" or the functions that the library does not have.
std::string look_up(Calls &calls) {
    const struct {
        const char *name;
        void **slot;
    } wanted[] = {
        {names::kSequenceManager, calls.construct.slot()},
        {names::kAllocator, calls.construct_allocator.slot()},
        {names::kCreate, calls.create.slot()},
        {names::kMaterialize, calls.materialize.slot()},
        {names::kUpdateAndSetUnlock, calls.unlock.slot()},
        {names::kEvict, calls.evict.slot()},
        {names::kTakeSnapshot, calls.take_snapshot.slot()},
        {names::kErase, calls.erase.slot()},
    };
    std::string lacking;
    for (const auto &one : wanted)
        if (!(*one.slot = resolve(one.name)))
            lacking += std::string(" ") + one.name;
    return lacking.empty() ? "" : "self-test: TurboMind does not define" + lacking;
}

class SelfTest {
  public:
    SelfTest(Calls &calls, bool prefix_cache) : calls_(calls) {
        std::memset(memory_, kCanary, sizeof memory_);
        Allocator allocator;
        calls.construct_allocator(&allocator, 0); // kCPU
        const BlockConfig config{kHeadDim, 1, kBlockTokens, 0, 16};
        calls.construct(memory_, 1, config, kNumBlocks, -1, prefix_cache, kRank, 1, allocator,
                        [] { return std::size_t{0}; });
        is_trusted_ = is_whole();
    }
    // Where the layout is another, it is left as it is rather than destroyed by our idea of it.
    ~SelfTest() {
        if (is_trusted_)
            manager().~SequenceManager();
    }

    // Is what TurboMind constructed as large as we think?
    bool is_whole() const {
        return std::all_of(memory_ + sizeof(SequenceManager), memory_ + sizeof memory_,
                           [](unsigned char byte) { return byte == kCanary; });
    }

    // The first fact that does not hold, "" where all do.
    std::string run() {
        if (!is_trusted_)
            return "the size of SequenceManager";
        if (auto fact = test_new(); !fact.empty())
            return fact;
        sequence_ = const_cast<Sequence *>(calls_.create(&manager(), kSession));
        for (auto test : {&SelfTest::test_created, &SelfTest::test_scheduled, &SelfTest::test_unlocked,
                          &SelfTest::test_rescheduled, &SelfTest::test_excluded, &SelfTest::test_erased})
            if (auto fact = (this->*test)(); !fact.empty())
                return fact;
        return "";
    }
    std::string test_trie() {
        const auto &trie = manager().block_trie;
        return trie && trie->block_seq_len == kBlockTokens ? "" : "BlockTrie, or where it is";
    }

  private:
    SequenceManager &manager() { return *std::launder(reinterpret_cast<SequenceManager *>(memory_)); }
    BlockManager &blocks() { return *manager().block_manager; }

    Outcome schedule(int context, AdjustInputCount adjust) {
        return calls_.materialize(&manager(), {sequence_}, {context}, {9}, 1, std::move(adjust));
    }

    std::string test_new() {
        const auto &made = manager();
        if (made.block_seq_len != kBlockTokens || made.rank != kRank || made.attn_cp_size != 1)
            return "the first members of SequenceManager";
        if (!made.sequences.empty() || made.block_trie || !made.block_manager)
            return "the members of SequenceManager";
        const auto &pool = *made.block_manager;
        if (pool.block_size != kBlockBytes || pool.max_block_count != kNumBlocks ||
            pool.chunk_size != kNumBlocks)
            return "the first members of BlockManager";
        if (pool.chunks.size() != 1 || pool.free.size() != kNumBlocks || pool.blocks.size() != kNumBlocks ||
            !pool.active.empty() || !pool.cached.empty())
            return "the lists of BlockManager";
        for (int i = 0; i < kNumBlocks; ++i)
            if (pool.blocks[i].id != i ||
                pool.blocks[i].data != static_cast<std::byte *>(pool.chunks[0]) + i * kBlockBytes)
                return "Block";
        return "";
    }

    std::string test_created() {
        const auto &made = *sequence_;
        const auto &all = manager().sequences;
        if (all.size() != 1 || &all.begin()->second != sequence_)
            return "SequenceManager::sequences";
        if (made.id != kSession || made.status != kCached || made.cache_len != 0 || made.input_length != 0 ||
            !made.blocks.empty() || !made.prompt.empty() || !made.tokens.empty())
            return "Sequence, when created";
        return "";
    }

    // `adjust` is given Materialize's own lists, to write to: 0003 rests on that.
    std::string test_scheduled() {
        bool is_same = false;
        const auto outcome = schedule(40, [&](const Sequences &sorted, const std::vector<int> &contexts) {
            is_same = sorted == Sequences{sequence_} && contexts == std::vector{40};
            const_cast<std::vector<int> &>(contexts)[0] = 24;
            return 30;
        });
        if (!is_same)
            return "what Materialize gives to adjust";
        if (outcome.allocation != 2 || outcome.swap_in != 1 || outcome.swap_out != 0)
            return "Materialize's outcome, or that adjust may change the context lengths";
        if (sequence_->status != kActive || sequence_->input_length != 24 || sequence_->blocks.size() != 2 ||
            sequence_->block_unique_ids != UniqueIds{1, 2})
            return "Sequence, when scheduled";
        const auto &last = blocks().blocks[sequence_->blocks[1]];
        if (blocks().active.size() != 2 || last.use_count != 1 || last.unique_id != 2)
            return "Block, when in use";
        return "";
    }

    std::string test_unlocked() {
        sequence_->cache_len = 24;
        calls_.unlock(&manager(), *sequence_);
        if (sequence_->status != kCached || manager().unlocked.size() != 2)
            return "SequenceManager::unlocked";
        calls_.materialize(&manager(), {}, {}, {}, 1, [](const auto &, const auto &) { return 1; });
        const auto snapshot = calls_.take_snapshot(&blocks());
        if (snapshot.active != 0 || snapshot.cached != 2 || snapshot.free != 2 ||
            snapshot.use_count.size() != kNumBlocks)
            return "Snapshot";
        calls_.evict(&blocks(), 1); // the last block goes first
        if (blocks().cached.size() != 1 || blocks().blocks[sequence_->blocks[1]].unique_id != 0)
            return "BlockManager::cached";
        return "";
    }

    std::string test_rescheduled() {
        const auto outcome = schedule(40, [](const auto &, const auto &) { return 100; });
        if (outcome.allocation != 2 || sequence_->cache_len != kBlockTokens ||
            sequence_->input_length != 40 - kBlockTokens || sequence_->blocks.size() != 3)
            return "Sequence, when it lost a block";
        return "";
    }

    std::string test_excluded() {
        const auto outcome = schedule(40, [](const auto &, const auto &) { return 0; });
        if (outcome.allocation != 0 || outcome.swap_out != 1 || sequence_->status != kLocked)
            return "that a budget of 0 schedules nobody";
        return "";
    }

    std::string test_erased() {
        if (!calls_.erase(&manager(), kSession) || !manager().sequences.empty() ||
            manager().unlocked.size() != 3 || manager().freed.size() != 3)
            return "SequenceManager::freed";
        return "";
    }

    Calls &calls_;
    Sequence *sequence_ = nullptr;
    bool is_trusted_ = false;
    alignas(16) unsigned char memory_[sizeof(SequenceManager) + 64];
};

} // namespace

std::string test_layouts() {
    Calls calls;
    if (auto why = look_up(calls); !why.empty())
        return why;
    try {
        auto fact = SelfTest(calls, false).run();
        if (fact.empty())
            fact = SelfTest(calls, true).test_trie();
        return fact.empty() ? "" : "self-test: not as in lmdeploy 0.11.0: " + fact;
    } catch (const std::exception &error) {
        return std::string("self-test: TurboMind refused: ") + error.what();
    }
}

} // namespace sagec::tm
