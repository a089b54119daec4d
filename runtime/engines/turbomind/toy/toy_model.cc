// A toy language model in the place of TurboMind's, so that its own gateway, batch and sequence manager
// run on a machine without a GPU.
//
// What it keeps of a real model is what scheduling can get wrong. Each token that a step computes is
// written into its slot of the real KV blocks, and the next token is a hash of *all* tokens of the
// sequence, read back from there in their order: a wrong block table, a block that was given away, KV
// that nobody computed or that was altered changes the output. With several ranks each hashes its own
// blocks, and the mean of their hashes is taken, by TurboMind's own all-reduce: a rank that differs
// changes the output too. `reference.py` says what is right.
//
// Beside the model a few kernels of TurboMind are replaced whose results the engine uses: copies of
// states between slots of a batch, of input tokens, of output tokens.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "library.h"
#include "toy_abi.h"

namespace sagec::tm::toy {
namespace {

struct Pace {
    std::int64_t step_us = 0, token_us = 0;
};

struct Flip {
    std::uint64_t session;
    int position, bit;
};

// A computed step of a rank: session, begin and end of each row.
struct Step {
    const Model *model;
    int rank;
    std::vector<std::int64_t> rows;
};

// What tests set and read, of all toy models of this process.
struct Bench {
    std::mutex mutex;
    Pace next_pace; // of models made from now on
    std::unordered_map<const Model *, Pace> paces;
    std::vector<Flip> flips;
    bool traces = false;
    std::vector<Step> trace;
    std::atomic<std::int64_t> steps{0};
};

Bench &bench() {
    static Bench &made = *new Bench; // engines' threads may outlive static objects
    return made;
}

Original<void(void *, const void *, void *, std::size_t, int, int, void *)> all_reduce_sum;

// ---- the KV of a sequence ---------------------------------------------------------------------------

// A sequence of a batch: its tokens [begin, end) are computed now.
struct Row {
    const Sequence *sequence;
    char *const *blocks;
    int begin, end;
};

// Where the model's share of a block belongs to a token: its first and its last word hold the token.
struct Slots {
    int block_tokens;
    std::size_t token_bytes;

    explicit Slots(const Model &model) : block_tokens(model.block_tokens) {
        const std::size_t bits = model.quantised_bits ? model.quantised_bits : 16;
        token_bytes = model.num_layers * model.local_kv_heads * 2 * model.head_dim * bits / 8;
    }
    std::uint32_t *first(const Row &row, int position) const {
        char *slot = row.blocks[position / block_tokens] + position % block_tokens * token_bytes;
        return reinterpret_cast<std::uint32_t *>(slot);
    }
    std::uint32_t *last(const Row &row, int position) const {
        return first(row, position) + token_bytes / sizeof(std::uint32_t) - 1;
    }
};

// Plus one, so that a slot which nobody wrote differs from token 0.
void write(const Slots &slots, const Row &row, const int *tokens) {
    for (int position = row.begin; position < row.end; ++position)
        *slots.first(row, position) = *slots.last(row, position) = *tokens++ + 1;
}

// As reference.py does it.
std::uint32_t next_hash(const Slots &slots, const Row &row) {
    std::uint32_t hash = 2166136261u;
    for (int position = 0; position < row.end; ++position)
        hash = (hash ^ *slots.first(row, position)) * 16777619u + *slots.last(row, position);
    hash = (hash ^ hash >> 16) * 0x85ebca6bu;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35u;
    return hash ^ hash >> 16;
}

// ---- a step -------------------------------------------------------------------------------------------

std::vector<Row> rows_of(const Buffer &block_pointers, const Buffer &block_offsets,
                         const Buffer &input_lengths, const Buffer &context_lengths,
                         const Sequence **sequences) {
    std::vector<Row> rows;
    for (std::ptrdiff_t i = 0; i < input_lengths.size; ++i) {
        const int end = context_lengths.as<int>()[i];
        char *const *blocks = block_pointers.as<char *>() + block_offsets.as<int>()[i];
        rows.push_back({sequences[i], blocks, end - input_lengths.as<int>()[i], end});
    }
    return rows;
}

// A step whose prompts do not fit into one pass of the model comes in parts: the first begins at row 0.
void note(const Model *model, const std::vector<Row> &rows, bool begins) {
    Bench &b = bench();
    const std::lock_guard<std::mutex> lock(b.mutex);
    if (!b.traces)
        return;
    auto is_own = [&](const Step &step) { return step.model == model; };
    auto own = std::find_if(b.trace.rbegin(), b.trace.rend(), is_own);
    if (begins || own == b.trace.rend()) {
        b.trace.push_back({model, model->rank, {}});
        own = b.trace.rbegin();
    }
    for (const Row &row : rows)
        own->rows.insert(own->rows.end(), {static_cast<std::int64_t>(row.sequence->id), row.begin, row.end});
}

void flip_bits(const Slots &slots, const std::vector<Row> &rows) {
    Bench &b = bench();
    const std::lock_guard<std::mutex> lock(b.mutex);
    auto flips_row = [&](const Flip &flip) {
        for (const Row &row : rows)
            if (row.sequence->id == flip.session && flip.position < row.end) {
                *slots.first(row, flip.position) ^= 1u << flip.bit;
                return true;
            }
        return false;
    };
    b.flips.erase(std::remove_if(b.flips.begin(), b.flips.end(), flips_row), b.flips.end());
}

// A model's pace is that which was set when it was made: TurboMind warms it up then, without sequences.
void begin_pace(const Model *model) {
    const std::lock_guard<std::mutex> lock(bench().mutex);
    bench().paces[model] = bench().next_pace;
}

void keep_pace(const Model *model, bool begins, std::int64_t num_tokens) {
    Pace pace;
    {
        const std::lock_guard<std::mutex> lock(bench().mutex);
        pace = bench().paces[model];
    }
    const std::int64_t us = pace.step_us * begins + pace.token_us * num_tokens;
    timespec left{us / 1000000, us % 1000000 * 1000};
    while (us && nanosleep(&left, &left) != 0) {
    }
}

// The mean of all ranks' hashes, by halves: sums of these are exact in float32.
void agree(const Model &model, std::vector<std::uint32_t> &hashes) {
    if (!model.communicators->device || hashes.empty())
        return;
    std::vector<float> halves;
    for (const std::uint32_t hash : hashes)
        halves.insert(halves.end(), {static_cast<float>(hash >> 16), static_cast<float>(hash & 0xffff)});
    all_reduce_sum(model.communicators->device, halves.data(), halves.data(), halves.size(), kFloat32, 0,
                   model.stream);
    auto mean = [&](float sum) { return static_cast<std::uint32_t>(sum) / model.num_ranks; };
    for (std::size_t i = 0; i < hashes.size(); ++i)
        hashes[i] = mean(halves[2 * i]) << 16 | mean(halves[2 * i + 1]);
}

// The features of a row are its hash, in its first bytes.
std::uint32_t *features(const Tensor &hidden, std::ptrdiff_t row) {
    auto *elements = static_cast<std::uint16_t *>(hidden.buffer.data.get()) + hidden.buffer.base;
    return reinterpret_cast<std::uint32_t *>(elements + row * hidden.stride[0]);
}

// LlamaV2::Forward. Buffers and tensors come by value, which for types like these is a reference.
void forward(const Model *model, const Buffer &tokens, const Tensor &, const Tensor &hidden,
             const Buffer &block_pointers, const Buffer &block_offsets, const Buffer &input_lengths,
             const Buffer &context_lengths, const Buffer &, void *, const Tensor &, const Buffer &,
             const Buffer &, const Buffer &, int, int, const Sequence **sequences) {
    if (!sequences)
        return begin_pace(model);
    const auto rows = rows_of(block_pointers, block_offsets, input_lengths, context_lengths, sequences);
    const Slots slots(*model);
    const int *token = tokens.as<int>();
    for (const Row &row : rows) {
        write(slots, row, token);
        token += row.end - row.begin;
    }
    flip_bits(slots, rows);
    std::vector<std::uint32_t> hashes;
    for (const Row &row : rows)
        hashes.push_back(next_hash(slots, row));
    agree(*model, hashes);
    for (std::size_t i = 0; i < hashes.size(); ++i)
        *features(hidden, static_cast<std::ptrdiff_t>(i)) = hashes[i];
    const bool begins = hidden.buffer.base == 0;
    bench().steps += begins && model->rank == 0;
    note(model, rows, begins);
    keep_pace(model, begins, token - tokens.as<int>());
}

// ---- sampling ------------------------------------------------------------------------------------------

// Of the rows of the batch of this thread, which is a rank of an engine.
thread_local std::vector<int> sampled;
thread_local std::vector<std::vector<int>> stops;

// LlamaV2::postDecodeEmbedding: the logits, of which only the number of rows is looked at.
Tensor post_decode_embedding(const Model *model, const Tensor &hidden, const Buffer &logits) {
    const auto num_rows = hidden.shape[0], vocab = static_cast<std::ptrdiff_t>(model->vocab_size);
    sampled.clear();
    for (std::ptrdiff_t row = 0; row < num_rows; ++row)
        sampled.push_back(static_cast<int>(*features(hidden, row) % model->vocab_size));
    return {{num_rows, vocab}, {vocab, 1}, num_rows * vocab, logits};
}

void cast_float_2d(const Tensor &, Tensor &, void *) {}

// DynamicDecodeLayer::Setup: whenever the batch changes. Stop words of one token are what it knows.
void setup(void *, const std::vector<const GenerationRequest *> &requests, const void *) {
    stops.clear();
    for (const GenerationRequest *request : requests) {
        auto &words = stops.emplace_back();
        int begin = 0;
        for (const int end : request->stop_ends) {
            if (end - begin == 1)
                words.push_back(request->stop_ids[static_cast<std::size_t>(begin)]);
            begin = end;
        }
    }
}

// LlamaV2::dynamicDecode. tokens: [step, rows].
void dynamic_decode(const Model *, const Buffer &tokens, const Buffer &finished, const Buffer &lengths,
                    const Tensor &, const Tensor &, const Buffer &limits, const Buffer &,
                    const Buffer &context_lengths, const Buffer &, const Buffer &, const Buffer &,
                    const Buffer &, int step, int) {
    const std::size_t num_rows = sampled.size();
    for (std::size_t i = 0; i < num_rows; ++i) {
        const auto &words = stops[i];
        const bool stopped = std::find(words.begin(), words.end(), sampled[i]) != words.end();
        tokens.as<int>()[static_cast<std::size_t>(step) * num_rows + i] = sampled[i];
        lengths.as<int>()[i] = context_lengths.as<int>()[i];
        finished.as<bool>()[i] |= stopped || step >= limits.as<int>()[i];
    }
}

void prepare_weights(void *, const void *) {}

// ---- kernels whose results the engine uses ------------------------------------------------------------

// For each of `num_arrays` arrays: target[to[i]] = source[from[i]], all at once, for the two may overlap.
void indexed_copy(char **sources, char **targets, const int *element_bytes, const int *from, const int *to,
                  int num_elements, int num_arrays, void *) {
    for (int k = 0; k < num_arrays; ++k) {
        const auto bytes = static_cast<std::size_t>(element_bytes[k]);
        std::vector<char> taken(bytes * static_cast<std::size_t>(num_elements));
        for (int i = 0; i < num_elements; ++i)
            std::memcpy(taken.data() + i * bytes, sources[k] + (from ? from[i] : i) * bytes, bytes);
        for (int i = 0; i < num_elements; ++i)
            std::memcpy(targets[k] + (to ? to[i] : i) * bytes, taken.data() + i * bytes, bytes);
    }
}

void batched_copy(void **sources, void **targets, const int *bytes, int num_copies, void *) {
    for (int i = 0; i < num_copies; ++i)
        std::memmove(targets[i], sources[i], static_cast<std::size_t>(bytes[i]));
}

// The last token of each row goes from [steps, rows], where shorter contexts are padded to the longest,
// to its place in [rows, max_length].
void gather_output(int *output, const int *tokens, const int *contexts, int max_context, int num_steps,
                   int max_length, int num_rows, void *) {
    const int step = num_steps - 1;
    for (int row = 0; row < num_rows; ++row) {
        const int context = contexts[row];
        const int position = step < context ? step : step - (max_context - context);
        const bool is_padding = context <= step && step < max_context;
        if (!is_padding && context <= position && position < max_length)
            output[row * max_length + position] = tokens[step * num_rows + row];
    }
}

std::vector<Hook> hooks() {
    static void *unused;
    auto hook = [](const char *name, auto *function) {
        return Hook{name, reinterpret_cast<void *>(function), &unused};
    };
    return {hook(names::kForward, forward),
            hook(names::kPostDecodeEmbedding, post_decode_embedding),
            hook(names::kDynamicDecode, dynamic_decode),
            hook(names::kSetup, setup),
            hook(names::kPrepare, prepare_weights),
            hook(names::kIndexedCopy, indexed_copy),
            hook(names::kBatchedCopy, batched_copy),
            hook(names::kGatherOutput, gather_output),
            hook(names::kCastFloat2D, cast_float_2d)};
}

// "" or what the loaded TurboMind lacks; then nothing is replaced.
std::string install() {
    if (num_patched())
        return "";
    *all_reduce_sum.slot() = resolve(names::kAllReduceSum);
    return all_reduce_sum ? patch(hooks()) : std::string("no function ") + names::kAllReduceSum;
}

} // namespace
} // namespace sagec::tm::toy

using namespace sagec::tm::toy;

extern "C" {

// NULL, or why nothing was replaced. Once is enough.
const char *sagec_toy_install(void) {
    static std::string refusal;
    refusal = install();
    return refusal.empty() ? nullptr : refusal.c_str();
}

// How long a step, and each of its tokens, takes the models that are made from now on.
void sagec_toy_set_pace(std::int64_t step_us, std::int64_t token_us) {
    const std::lock_guard<std::mutex> lock(bench().mutex);
    bench().next_pace = {step_us, token_us};
}

// The next step that has the session's token `position` behind it flips a bit of its KV first.
void sagec_toy_flip(std::uint64_t session, std::int32_t position, std::int32_t bit) {
    const std::lock_guard<std::mutex> lock(bench().mutex);
    bench().flips.push_back({session, position, bit});
}

// Whether steps are noted from now on; what was is forgotten.
void sagec_toy_trace(std::int32_t traces) {
    const std::lock_guard<std::mutex> lock(bench().mutex);
    bench().traces = traces != 0;
    bench().trace.clear();
}

// Noted steps as int64s: rank, number of rows, then session, begin and end of each; they are forgotten.
// Returns how many int64s they are, and takes nothing where that is more than `capacity`.
std::int64_t sagec_toy_take_trace(std::int64_t *numbers, std::int64_t capacity) {
    const std::lock_guard<std::mutex> lock(bench().mutex);
    auto &trace = bench().trace;
    std::size_t size = 0;
    for (const Step &step : trace)
        size += 2 + step.rows.size();
    if (static_cast<std::int64_t>(size) > capacity)
        return static_cast<std::int64_t>(size);
    for (const Step &step : trace) {
        *numbers++ = step.rank;
        *numbers++ = static_cast<std::int64_t>(step.rows.size()) / 3;
        numbers = std::copy(step.rows.begin(), step.rows.end(), numbers);
    }
    trace.clear();
    return static_cast<std::int64_t>(size);
}

// Steps that all toy models have computed.
std::int64_t sagec_toy_steps(void) { return bench().steps; }
}
