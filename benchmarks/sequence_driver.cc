// Drives TurboMind's own SequenceManager as LlamaBatch::Initialize does, in host memory, and times it.
//
// Each step calls Materialize either where the library defines it (stock, whatever is patched) or
// through the library's PLT slot, where a patch has put its hook. After a step the bookkeeping of
// LlamaBatch is done: what was to be computed is computed, and each sequence that is up to date has
// one more token. No CUDA, no model: a step is the scheduler alone.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <new>

#include "abi.h"
#include "library.h"

using namespace sagec::tm;

namespace {

using Materialize = Outcome (*)(SequenceManager *, Sequences, std::vector<int>,
                                const std::vector<std::uint64_t> &, int, AdjustInputCount);
using Create = const Sequence *(*)(SequenceManager *, std::uint64_t);
using MakeAllocator = void (*)(Allocator *, int);
using MakeManager = void (*)(SequenceManager *, std::size_t, const BlockConfig &, double, int, bool, int, int,
                             Allocator, GetFreeBytes);

constexpr int kHostMemory = 0, kWholePool = -1, kStepTokens = 1 << 20;

template <class Function> Function original(const char *name) {
    return reinterpret_cast<Function>(resolve(name));
}

// A manager that is never destroyed: its destructor is not exported, and a process has a handful.
struct SequenceDriver {
    alignas(16) std::byte storage[sizeof(SequenceManager)];
    SequenceManager *manager = reinterpret_cast<SequenceManager *>(storage);
    Sequences sequences;
    std::vector<int> contexts;
    std::vector<std::uint64_t> priorities;

    SequenceDriver(int num_blocks, int block_tokens) {
        Allocator allocator;
        original<MakeAllocator>(names::kAllocator)(&allocator, kHostMemory);
        const BlockConfig config{16, 1, block_tokens, 0, 8};
        original<MakeManager>(names::kSequenceManager)(manager, 1, config, num_blocks, kWholePool, false, 0,
                                                       1, allocator, [] { return std::size_t{1} << 30; });
    }

    void add(std::uint64_t session, int context) {
        sequences.push_back(original<Create>(names::kCreate)(manager, session));
        contexts.push_back(context);
        priorities.push_back(sequences.size());
    }

    std::int64_t step(Materialize materialize) {
        const auto budget = [](const Sequences &, const std::vector<int> &) { return kStepTokens; };
        const auto begin = std::chrono::steady_clock::now();
        materialize(manager, sequences, contexts, priorities, 1, budget);
        const auto spent = std::chrono::steady_clock::now() - begin;
        return std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count();
    }

    int compute() {
        int tokens = 0;
        for (std::size_t i = 0; i < sequences.size(); ++i) {
            auto &sequence = const_cast<Sequence &>(*sequences[i]);
            if (sequence.status != kActive)
                continue;
            tokens += sequence.input_length;
            sequence.cache_len += sequence.input_length;
            contexts[i] += sequence.cache_len == contexts[i];
        }
        return tokens;
    }
};

} // namespace

extern "C" {

void *sagec_driver_new(std::int32_t num_blocks, std::int32_t block_tokens) {
    return new SequenceDriver(num_blocks, block_tokens);
}

void sagec_driver_add(void *driver, std::uint64_t session, std::int32_t context) {
    static_cast<SequenceDriver *>(driver)->add(session, context);
}

// Takes `num_steps` steps, through the slot or not; what each took goes to `spent_ns`. Returns the
// tokens that were computed.
std::int64_t sagec_driver_run(void *driver, std::int32_t through_slot, std::int64_t num_steps,
                              std::int64_t *spent_ns) {
    auto &driven = *static_cast<SequenceDriver *>(driver);
    void *function = through_slot ? called(names::kMaterialize) : resolve(names::kMaterialize);
    std::int64_t tokens = 0;
    for (std::int64_t i = 0; i < num_steps; ++i) {
        spent_ns[i] = driven.step(reinterpret_cast<Materialize>(function));
        tokens += driven.compute();
    }
    return tokens;
}

} // extern "C"
