#include "kv_store.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#include "sagec_turbomind.h"

namespace sagec::tm {

namespace {

// Ranks go in lock step, so that a vote is over at once. One that waits longer than this takes it that
// the others do not see the blob, and everybody prefills.
constexpr std::chrono::seconds kVoteTimeout{2};

constexpr std::size_t kMaxSpares = 4;

std::string hex(std::uint64_t number) {
    char text[19];
    std::snprintf(text, sizeof text, "0x%016llx", static_cast<unsigned long long>(number));
    return text;
}

bool has_sane_sizes(const BlobHeader &header, std::int64_t num_bytes) {
    if (header.num_ranks < 1 || header.num_ranks > 1024 || header.block_bytes < 1 || header.block_tokens < 1)
        return false;
    if (header.tokens < 1 || header.num_blocks < 1 || header.block_bytes > num_bytes)
        return false;
    const std::int64_t blocks = (header.tokens - 1) / header.block_tokens + 1;
    return header.num_blocks == blocks && blocks <= num_bytes / header.block_bytes / header.num_ranks;
}

Blob make_blob(std::int64_t num_bytes) {
    Blob blob;
    blob.bytes.reset(new (std::nothrow) std::byte[static_cast<std::size_t>(num_bytes)]);
    blob.num_bytes = blob.capacity_bytes = blob.bytes ? num_bytes : 0;
    return blob;
}

} // namespace

BlobHeader Blob::header() const {
    BlobHeader header;
    std::memcpy(&header, bytes.get(), sizeof header);
    return header;
}

std::byte *Blob::part(int rank) const {
    return bytes.get() + sizeof(BlobHeader) + rank * header().part_bytes();
}

std::uint32_t blob_checksum(const void *blob, std::int64_t num_bytes) {
    const auto bytes = static_cast<const std::byte *>(blob);
    const std::uint32_t of_header = crc32c(bytes, offsetof(BlobHeader, checksum));
    return crc32c(bytes + sizeof(BlobHeader), num_bytes - sizeof(BlobHeader), of_header);
}

std::string check_blob(const void *bytes, std::int64_t num_bytes, std::uint64_t layout) {
    if (!bytes || num_bytes < std::int64_t(sizeof(BlobHeader)))
        return std::to_string(num_bytes) + " bytes are no KV blob; its header alone has 64";
    BlobHeader header;
    std::memcpy(&header, bytes, sizeof header);
    if (std::memcmp(header.magic, kBlobMagic, sizeof kBlobMagic) != 0)
        return "no KV blob: it does not begin with \"sagecKV\"";
    if (header.version != kBlobVersion)
        return "KV blob of version " + std::to_string(header.version) + "; this build reads version " +
               std::to_string(kBlobVersion);
    if (header.layout != layout)
        return "KV blob of layout " + hex(header.layout) + "; needed is " + hex(layout) +
               " (same model, precision, block size and ranks on both sides)";
    if (!has_sane_sizes(header, num_bytes) || header.blob_bytes() != num_bytes)
        return "KV blob is cut: " + std::to_string(num_bytes) + " bytes, its header says otherwise";
    if (blob_checksum(bytes, num_bytes) != header.checksum || header.reserved_at_end)
        return "KV blob is altered: its checksum is " + hex(header.checksum) + ", its bytes have " +
               hex(blob_checksum(bytes, num_bytes));
    return "";
}

void KvStore::want(std::uint64_t session) {
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_.insert(session);
}

Blob KvStore::take_spare(std::int64_t num_bytes) {
    auto best = spares_.end();
    for (auto spare = spares_.begin(); spare != spares_.end(); ++spare)
        if (spare->capacity_bytes >= num_bytes &&
            (best == spares_.end() || spare->capacity_bytes < best->capacity_bytes))
            best = spare;
    if (best == spares_.end())
        return make_blob(num_bytes);
    std::swap(*best, spares_.back());
    Blob blob = std::move(spares_.back());
    spares_.pop_back();
    blob.num_bytes = num_bytes;
    return blob;
}

// The largest ones are kept; `blob` is left with what is not, which the caller frees without the lock.
void KvStore::keep_spare(Blob &blob) {
    if (!blob.bytes)
        return;
    if (spares_.size() < kMaxSpares) {
        spares_.push_back(std::move(blob));
        return;
    }
    for (Blob &spare : spares_)
        if (spare.capacity_bytes < blob.capacity_bytes)
            std::swap(spare, blob);
}

Blob KvStore::memory_for(std::int64_t num_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    return take_spare(num_bytes);
}

std::byte *KvStore::begin_erase(std::uint64_t session, int rank, const BlobHeader &header,
                                std::int64_t now_us) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto [found, is_first] = leaving_.try_emplace(session);
    Leaving &leaving = found->second;
    if (is_first) {
        leaving.ranks_left = static_cast<int>(header.num_ranks);
        leaving.begin_us = now_us;
        if (wanted_.erase(session) && header.tokens > 0)
            leaving.blob = take_spare(header.blob_bytes());
        if (leaving.blob.bytes)
            std::memcpy(leaving.blob.bytes.get(), &header, sizeof header);
    }
    if (!leaving.blob.bytes)
        return nullptr;
    const bool agrees = std::memcmp(leaving.blob.bytes.get(), &header, sizeof header) == 0;
    return agrees ? leaving.blob.part(rank) : nullptr;
}

Erased KvStore::end_erase(std::uint64_t session, bool copied) {
    Leaving leaving; // and what else is freed goes after the lock
    Arrival arrival;
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = leaving_.find(session);
    found->second.whole &= copied;
    if (--found->second.ranks_left > 0)
        return {};
    leaving = std::move(found->second);
    leaving_.erase(found);
    if (const auto arrived = arrivals_.find(session); arrived != arrivals_.end()) {
        arrival = std::move(arrived->second);
        arrivals_.erase(arrived);
    }
    const bool exported = leaving.blob.bytes && leaving.whole;
    const Erased erased{true, exported, leaving.blob.num_bytes, leaving.begin_us};
    if (exported)
        exports_[session] = std::move(leaving.blob);
    return erased;
}

std::string KvStore::take(std::uint64_t session, void *blob, std::int64_t num_bytes) {
    Blob taken;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = exports_.find(session);
        if (found == exports_.end())
            return "no export of session " + std::to_string(session) + " is here";
        if (found->second.num_bytes != num_bytes || !blob)
            return "the export has " + std::to_string(found->second.num_bytes) + " bytes, not " +
                   std::to_string(blob ? num_bytes : 0);
        taken = std::move(found->second);
        exports_.erase(found);
    }
    BlobHeader header = taken.header();
    header.checksum = blob_checksum(taken.bytes.get(), num_bytes);
    std::memcpy(blob, taken.bytes.get(), static_cast<std::size_t>(num_bytes));
    std::memcpy(blob, &header, sizeof header);
    std::lock_guard<std::mutex> lock(mutex_);
    keep_spare(taken);
    return "";
}

void KvStore::stage(std::uint64_t session, Blob blob) {
    std::lock_guard<std::mutex> lock(mutex_);
    arrivals_[session].blob = std::make_shared<Blob>(std::move(blob));
}

bool KvStore::has_begun(std::uint64_t session) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = arrivals_.find(session);
    return found != arrivals_.end() && found->second.begun;
}

std::shared_ptr<Blob> KvStore::arrive(std::uint64_t session) {
    std::lock_guard<std::mutex> lock(mutex_);
    Arrival &arrival = arrivals_[session];
    arrival.begun = true;
    return arrival.blob;
}

void KvStore::let_go(std::shared_ptr<Blob> blob) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (blob.use_count() == 1)
        keep_spare(*blob);
    else
        blob.reset();
}

KvStore::Agreed KvStore::end_vote(Arrival &arrival) {
    const int before = std::exchange(arrival.agreed, arrival.vote);
    const bool is_news = arrival.round++ == 0 || before != arrival.agreed;
    if (arrival.agreed != SAGEC_TM_NO_ROOM)
        arrival.blob.reset(); // ranks that import it now hold it too
    arrival.num_voted = 0;
    voted_.notify_all();
    return {arrival.agreed, true, is_news};
}

KvStore::Agreed KvStore::vote(std::uint64_t session, int num_ranks, int why, bool has_time_limit) {
    std::unique_lock<std::mutex> lock(mutex_);
    Arrival &arrival = arrivals_[session]; // stays where it is until all ranks erase the session
    const bool agrees = arrival.num_voted == 0 || arrival.vote == why;
    arrival.vote = agrees ? why : SAGEC_TM_NOT_ALL_RANKS;
    if (++arrival.num_voted == num_ranks)
        return end_vote(arrival);
    const auto is_over = [&arrival, round = arrival.round] { return arrival.round != round; };
    if (!has_time_limit)
        voted_.wait(lock, is_over);
    else if (!voted_.wait_for(lock, kVoteTimeout, is_over)) {
        arrival.vote = SAGEC_TM_NOT_ALL_RANKS;
        return end_vote(arrival);
    }
    return {arrival.agreed, false, false};
}

KvStore::Agreed KvStore::agree(std::uint64_t session, int num_ranks, int why) {
    return vote(session, num_ranks, why, true);
}

KvStore::Agreed KvStore::conclude(std::uint64_t session, int num_ranks, int why) {
    return vote(session, num_ranks, why, false);
}

void KvStore::forget(std::uint64_t session) {
    Blob exported; // freed after the lock, as what follows
    std::shared_ptr<Blob> staged;
    std::lock_guard<std::mutex> lock(mutex_);
    wanted_.erase(session);
    if (const auto found = exports_.find(session); found != exports_.end()) {
        exported = std::move(found->second);
        exports_.erase(found);
        keep_spare(exported);
    }
    const auto found = arrivals_.find(session);
    if (found == arrivals_.end())
        return;
    staged = std::move(found->second.blob);
    if (staged && staged.use_count() == 1) // no rank copies from it now
        keep_spare(*staged);
    if (!found->second.begun)
        arrivals_.erase(found);
}

} // namespace sagec::tm
