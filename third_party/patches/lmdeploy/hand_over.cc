#include "hand_over.h"

#include <algorithm>
#include <cstring>

#include "device_copy.h"
#include "hooks.h"
#include "instance.h"

namespace sagec::tm {

namespace {

// The blocks of a sequence that are its own still: another may have evicted those behind them.
int num_owned_blocks(const BlockManager &blocks, const Sequence &sequence) {
    std::size_t num = 0;
    while (num < sequence.blocks.size() &&
           blocks.blocks[sequence.blocks[num]].unique_id == sequence.block_unique_ids[num])
        ++num;
    return static_cast<int>(num);
}

// What the blob of a sequence's `computed` tokens says of itself.
BlobHeader describe(const Instance &instance, const SequenceManager &manager, const Sequence &sequence,
                    int computed) {
    BlobHeader header{};
    // a context-parallel rank holds every n-th token, which a blob has no words for
    const int tokens =
        manager.attn_cp_size == 1 ? std::min(computed, static_cast<int>(sequence.tokens.size())) : 0;
    std::memcpy(header.magic, kBlobMagic, sizeof kBlobMagic);
    header.version = kBlobVersion;
    header.num_ranks = static_cast<std::uint32_t>(instance.options.num_ranks);
    header.layout = instance.layout;
    header.tokens = tokens;
    header.block_bytes = static_cast<std::int64_t>(manager.block_manager->block_size);
    header.block_tokens = manager.block_seq_len;
    header.num_blocks = (tokens + manager.block_seq_len - 1) / manager.block_seq_len;
    header.token_checksum = crc32c(sequence.tokens.data(), tokens * sizeof(int));
    return header;
}

DeviceBlocks addresses(const BlockManager &blocks, const BlockIds &ids, int count) {
    DeviceBlocks data;
    data.reserve(count);
    for (int i = 0; i < count; ++i)
        data.push_back(blocks.blocks[ids[i]].data);
    return data;
}

void tell_of_erasure(Instance &instance, std::uint64_t session, int computed, const Erased &erased,
                     std::int64_t tokens) {
    const auto name = static_cast<std::int64_t>(session);
    if (erased.exported) {
        instance.count(&sagec_tm_counters::exports);
        instance.events.write(SAGEC_TM_EXPORTED, {name, tokens, erased.num_bytes, erased.begin_us, now_us()});
    }
    instance.events.write(SAGEC_TM_ERASED, {name, computed});
}

bool are_same_blocks(const SequenceManager &manager, const BlobHeader &header) {
    return header.block_bytes == static_cast<std::int64_t>(manager.block_manager->block_size) &&
           header.block_tokens == manager.block_seq_len && manager.attn_cp_size == 1 &&
           manager.rank < static_cast<int>(header.num_ranks);
}

// Why a sequence cannot begin with the blob, or 0.
int objection(const SequenceManager &manager, const Sequence &sequence, const BlobHeader &header) {
    const BlockManager &blocks = *manager.block_manager;
    if (!are_same_blocks(manager, header))
        return SAGEC_TM_OTHER_BLOCKS;
    if (header.tokens >= static_cast<std::int64_t>(sequence.prompt.size()))
        return SAGEC_TM_TOO_LONG;
    if (header.num_blocks > num_free_blocks(blocks) + static_cast<int>(blocks.cached.size()))
        return SAGEC_TM_NO_ROOM;
    if (crc32c(sequence.prompt.data(), header.tokens * sizeof(int)) != header.token_checksum)
        return SAGEC_TM_OTHER_TOKENS;
    return 0;
}

template <class Signature> Original<Signature> named(const char *name) {
    Original<Signature> function;
    *function.slot() = resolve(name);
    return function;
}

struct Taken {
    BlockIds blocks;
    UniqueIds uids;
};

// Free blocks, made by evicting cached ones where they do not suffice. There are enough of both. The trie
// must hear of it at once: it would match prefixes in blocks that are another's now.
Taken take_blocks(SequenceManager &manager, int count) {
    static const auto allocate = named<std::pair<BlockIds, UniqueIds>(BlockManager *, int)>(names::kAllocate);
    static const auto verify = named<void(BlockTrie *)>(names::kTrieVerify);
    BlockManager &blocks = *manager.block_manager;
    if (const int missing = count - num_free_blocks(blocks); missing > 0) {
        evict_blocks(blocks, missing);
        if (manager.block_trie)
            verify(manager.block_trie.get());
    }
    auto taken = allocate(&blocks, count);
    return {std::move(taken.first), std::move(taken.second)};
}

// As TurboMind itself frees: when the next step begins.
void give_back(SequenceManager &manager, const BlockIds &ids) {
    BlockManager &blocks = *manager.block_manager;
    for (const int id : ids)
        blocks.blocks[id].timestamp = blocks.next_timestamp++;
    manager.unlocked.insert(manager.unlocked.end(), ids.begin(), ids.end());
    manager.freed.insert(manager.freed.end(), ids.begin(), ids.end());
}

void tell_of_import(Instance &instance, std::uint64_t session, const Blob &blob, int why,
                    std::int64_t begin_us) {
    const auto name = static_cast<std::int64_t>(session);
    instance.count(why ? &sagec_tm_counters::refused_imports : &sagec_tm_counters::imports);
    if (why)
        instance.events.write(SAGEC_TM_NOT_IMPORTED, {name, why});
    else
        instance.events.write(SAGEC_TM_IMPORTED,
                              {name, blob.header().tokens, blob.num_bytes, begin_us, now_us()});
}

// The ranks agree before anything is done, for where one evicted blocks and another did not, their pools
// would no longer be alike, as TurboMind trusts that they are; and after it, should a copy have failed.
void import(Instance &instance, SequenceManager &manager, Sequence &sequence, const Blob &blob) {
    const std::int64_t begin_us = now_us();
    const BlobHeader header = blob.header();
    const int num_ranks = instance.options.num_ranks;
    const auto able = instance.kv.agree(sequence.id, num_ranks, objection(manager, sequence, header));
    if (able.why) {
        if (able.is_last && able.is_news)
            tell_of_import(instance, sequence.id, blob, able.why, begin_us);
        return;
    }
    Taken taken = take_blocks(manager, header.num_blocks);
    const auto &blocks = *manager.block_manager;
    const bool copied = copy_to_device(blob.part(manager.rank), blocks.block_size,
                                       addresses(blocks, taken.blocks, header.num_blocks));
    const auto done = instance.kv.conclude(sequence.id, num_ranks, copied ? 0 : SAGEC_TM_NOT_COPIED);
    if (done.is_last)
        tell_of_import(instance, sequence.id, blob, done.why, begin_us);
    if (done.why)
        return give_back(manager, taken.blocks);
    sequence.blocks = std::move(taken.blocks);
    sequence.block_unique_ids = std::move(taken.uids);
    sequence.cache_len = static_cast<int>(header.tokens);
}

} // namespace

void export_erased(Instance &instance, const SequenceManager &manager, const Sequence &sequence) {
    const int owned = num_owned_blocks(*manager.block_manager, sequence) * manager.block_seq_len;
    const int computed = std::min(sequence.cache_len, owned);
    const BlobHeader header = describe(instance, manager, sequence, computed);
    std::byte *part = instance.kv.begin_erase(sequence.id, manager.rank, header, now_us());
    const bool copied =
        part && copy_to_host(addresses(*manager.block_manager, sequence.blocks, header.num_blocks),
                             manager.block_manager->block_size, part);
    const Erased erased = instance.kv.end_erase(sequence.id, copied);
    if (erased.last)
        tell_of_erasure(instance, sequence.id, computed, erased, header.tokens);
}

void import_staged(Instance &instance, SequenceManager &manager, const Sequences &sequences) {
    for (const Sequence *sequence : sequences) {
        if (sequence->cache_len || !sequence->blocks.empty() || !sequence->tokens.empty())
            continue;
        // Computed once, as there was no room, and preempted since: with a prefix cache TurboMind clears
        // a prompt when all of it is computed, and nothing is left to hold the blob against.
        if (sequence->prompt.empty())
            continue;
        if (auto blob = instance.kv.arrive(sequence->id)) {
            import(instance, manager, const_cast<Sequence &>(*sequence), *blob);
            instance.kv.let_go(std::move(blob));
        }
    }
}

int num_free_blocks(const BlockManager &blocks) {
    return static_cast<int>(blocks.free.size()) + blocks.max_block_count -
           static_cast<int>(blocks.blocks.size());
}

} // namespace sagec::tm
