// 0001: what the KV blocks are used for, who is evicted, and KV in and out of an engine.
//
// Hooks SequenceManager::Erase, the last moment in which a sequence owns its blocks: KV that is wanted
// elsewhere is copied to host memory there. Hooks BlockManager::Evict, which tells nobody whom it picks.
// Import has no hook of its own: 0002 calls it before TurboMind looks for prefixes, as a sequence that
// begins with KV from elsewhere looks just like one that the prefix cache had tokens of.
#include <algorithm>
#include <cstring>

#include "hand_over.h"
#include "hooks.h"
#include "instance.h"
#include "refusal.h"

namespace sagec::tm {

namespace {

Original<bool(SequenceManager *, std::uint64_t)> original_erase;
Original<void(BlockManager *, int)> original_evict;

bool erase(SequenceManager *manager, std::uint64_t session) {
    if (manager->rank == 0)
        forget_stored(session);
    const auto instance = instance_of(session);
    const auto found = manager->sequences.find(session);
    if (!instance || found == manager->sequences.end())
        return original_erase(manager, session);
    std::lock_guard<std::mutex> lock(instance->blocks_mutex(manager->rank));
    export_erased(*instance, *manager, found->second);
    return original_erase(manager, session);
}

struct Cached {
    int block;
    std::uint64_t uid;
};

void tell_of_eviction(Instance &instance, const std::vector<std::int64_t> &uids,
                      const std::vector<Cached> &evicted) {
    const auto count = static_cast<std::int64_t>(uids.size());
    instance.count(&sagec_tm_counters::evicted_blocks, count);
    instance.events.write(SAGEC_TM_EVICTED, {count}, uids);
    std::lock_guard<std::mutex> lock(instance.callback_mutex);
    if (instance.evicted)
        for (const Cached &block : evicted)
            instance.evicted(instance.number, block.block, block.uid, instance.evicted_argument);
}

// Called by Materialize, that is with the rank's blocks locked.
void evict(BlockManager *blocks, int count) {
    const Place &place = here();
    if (!place.instance || place.rank != 0)
        return original_evict(blocks, count);
    thread_local std::vector<Cached> before; // an evicted block has no unique id any more
    before.clear();
    for (const int block : blocks->cached)
        before.push_back({block, blocks->blocks[block].unique_id});
    original_evict(blocks, count);
    std::vector<std::int64_t> uids;
    const auto is_there = [&](const Cached &was) { return blocks->blocks[was.block].unique_id == was.uid; };
    before.erase(std::remove_if(before.begin(), before.end(), is_there), before.end());
    for (const Cached &was : before)
        uids.push_back(static_cast<std::int64_t>(was.uid));
    tell_of_eviction(*place.instance, uids, before);
}

} // namespace

void evict_blocks(BlockManager &blocks, int count) { evict(&blocks, count); }

std::vector<Hook> kv_manager_hooks() {
    return {{names::kErase, reinterpret_cast<void *>(erase), original_erase.slot()},
            {names::kEvict, reinterpret_cast<void *>(evict), original_evict.slot()}};
}

} // namespace sagec::tm

namespace {

using namespace sagec::tm;

constexpr int kInstanceShift = SAGEC_TM_INSTANCE_SHIFT;

sagec_tm_block describe(const Block &block) {
    sagec_tm_block row{};
    row.uid = static_cast<std::int64_t>(block.unique_id);
    row.timestamp = static_cast<std::int64_t>(block.timestamp);
    row.id = block.id;
    row.use_count = block.use_count;
    row.data = block.data;
    return row;
}

sagec_tm_blocks total(const SequenceManager &manager) {
    const BlockManager &all = *manager.block_manager;
    sagec_tm_blocks totals{};
    totals.block_bytes = static_cast<std::int64_t>(all.block_size);
    totals.block_tokens = manager.block_seq_len;
    totals.num_blocks = all.max_block_count;
    totals.active = static_cast<int>(all.active.size());
    totals.cached = static_cast<int>(all.cached.size());
    totals.free = num_free_blocks(all);
    return totals;
}

// "" or why the move cannot be done.
std::string check_move(const Instance &instance, const sagec_tm_move &move) {
    if (move.session >> kInstanceShift != instance.number)
        return "it is none of instance " + std::to_string(instance.number) + "'s";
    if (move.direction == SAGEC_TM_TO_HOST)
        return "";
    if (move.direction != SAGEC_TM_TO_DEVICE)
        return "direction " + std::to_string(move.direction) + "; there are 1 (to host) and 2 (to device)";
    if (instance.kv.has_begun(move.session))
        return "it has begun already; a blob is staged before its session is submitted";
    if (instance.layout && instance.layout != move.layout)
        return "the layout asked for is not this instance's own";
    std::string wrong = check_blob(move.blob, move.num_bytes, move.layout);
    if (!wrong.empty())
        return wrong;
    BlobHeader header;
    std::memcpy(&header, move.blob, sizeof header);
    if (static_cast<int>(header.num_ranks) != instance.options.num_ranks)
        return "KV blob of " + std::to_string(header.num_ranks) + " ranks; the instance has " +
               std::to_string(instance.options.num_ranks);
    return "";
}

// The blobs of all moves that need one; fewer where there is no memory for them.
std::vector<Blob> copy_blobs(Instance &instance, const sagec_tm_move *moves, int num_moves) {
    std::vector<Blob> blobs;
    for (int i = 0; i < num_moves; ++i) {
        if (moves[i].direction != SAGEC_TM_TO_DEVICE)
            continue;
        Blob blob = instance.kv.memory_for(moves[i].num_bytes);
        if (!blob.bytes)
            return {};
        std::memcpy(blob.bytes.get(), moves[i].blob, static_cast<std::size_t>(moves[i].num_bytes));
        blobs.push_back(std::move(blob));
    }
    return blobs;
}

std::string migrate(Instance &instance, const sagec_tm_move *moves, int num_moves) {
    std::ptrdiff_t num_blobs = 0;
    for (int i = 0; i < num_moves; ++i) {
        const std::string wrong = check_move(instance, moves[i]);
        if (!wrong.empty())
            return "session " + std::to_string(moves[i].session) + ": " + wrong;
        num_blobs += moves[i].direction == SAGEC_TM_TO_DEVICE;
    }
    std::vector<Blob> blobs = copy_blobs(instance, moves, num_moves);
    if (static_cast<std::ptrdiff_t>(blobs.size()) != num_blobs)
        return "no memory for " + std::to_string(num_blobs) + " KV blobs";
    auto blob = blobs.begin();
    for (int i = 0; i < num_moves; ++i) {
        if (moves[i].direction == SAGEC_TM_TO_HOST)
            instance.kv.want(moves[i].session);
        else
            instance.kv.stage(moves[i].session, std::move(*blob++));
    }
    return "";
}

} // namespace

const char *sagec_tm_get_block_info(uint32_t number, int32_t rank, sagec_tm_blocks *totals,
                                    sagec_tm_block *blocks, int32_t capacity) {
    return refusal_of(number, [&](Instance &instance) {
        std::lock_guard<std::mutex> lock(instance.blocks_mutex(rank));
        const SequenceManager *manager = instance.manager_of(rank);
        if (!manager)
            return "rank " + std::to_string(rank) + " of instance " + std::to_string(number) +
                   " has not taken a step yet";
        const BlockManager &all = *manager->block_manager;
        *totals = total(*manager);
        const int num_rows = std::min(capacity, static_cast<int>(all.blocks.size()));
        std::transform(all.blocks.begin(), all.blocks.begin() + num_rows, blocks, describe);
        return std::string();
    });
}

const char *sagec_tm_register_eviction_callback(uint32_t number, sagec_tm_evicted callback, void *argument) {
    return refusal_of(number, [&](Instance &instance) {
        std::lock_guard<std::mutex> lock(instance.callback_mutex);
        instance.evicted = callback;
        instance.evicted_argument = argument;
        return std::string();
    });
}

const char *sagec_tm_migrate_blocks(uint32_t number, const sagec_tm_move *moves, int32_t num_moves) {
    return refusal_of(number, [&](Instance &instance) { return migrate(instance, moves, num_moves); });
}

void sagec_tm_forget(uint32_t number, uint64_t session) {
    if (const auto instance = instance_numbered(number))
        instance->kv.forget(session);
}

const char *sagec_tm_take_export(uint32_t number, uint64_t session, void *blob, int64_t num_bytes) {
    return refusal_of(number, [&](Instance &instance) { return instance.kv.take(session, blob, num_bytes); });
}

uint64_t sagec_tm_layout(uint64_t seed, int64_t block_bytes, int32_t block_tokens, int32_t num_ranks) {
    const std::uint64_t parts[] = {kBlobVersion, seed, static_cast<std::uint64_t>(block_bytes),
                                   static_cast<std::uint64_t>(block_tokens),
                                   static_cast<std::uint64_t>(num_ranks)};
    std::uint64_t hash = 0xcbf29ce484222325; // FNV-1a; never 0, which stands for none
    for (const std::uint64_t part : parts)
        for (int shift = 0; shift < 64; shift += 8)
            hash = (hash ^ ((part >> shift) & 0xff)) * 0x100000001b3;
    return hash ? hash : 1;
}

void sagec_tm_set_layout(uint32_t number, uint64_t layout) {
    if (const auto instance = instance_numbered(number))
        instance->layout = layout;
}

uint32_t sagec_tm_crc32c(const void *bytes, int64_t num_bytes, int32_t by_table) {
    const auto size = static_cast<std::size_t>(num_bytes);
    return by_table ? crc32c_by_table(bytes, size) : crc32c(bytes, size);
}
