// Who has KV of whom: runtime/kv/directory.py.
#include "directory.h"

#include <algorithm>
#include <utility>

namespace sagec {

Directory::Directory(std::vector<Request> &requests, std::vector<i64> block_tokens, i64 blocks,
                     BlocksOf blocks_of)
    : requests_(requests), block_tokens_(std::move(block_tokens)), blocks_of_(std::move(blocks_of)),
      held_(block_tokens_.size()) {
    for (std::size_t at = 0; at < held_.size(); ++at) {
        if (!block_tokens_[at])
            continue;
        held_[at].assign(blocks, 0);
        size_ = block_tokens_[at];
    }
}

void Directory::wait(i32 request, i64 output_tokens) {
    Request &asked = requests_[request];
    if (!blocks_of_ || are_told(asked, output_tokens))
        return;
    std::vector<i64> &blocks = others_[request];
    blocks = blocks_of_(request, output_tokens);
    if (asked.hashes_given)
        return; // instances go on with those
    asked.hashes = blocks.data();
    asked.num_hashes = static_cast<i64>(blocks.size());
}

// Whether the request's own hashes are all there is to know; those given must be one a block.
bool Directory::are_told(const Request &asked, i64 output_tokens) const {
    if (!asked.hashes_given)
        return !output_tokens;
    return !size_ || (!output_tokens && asked.num_hashes == asked.prompt_tokens / size_);
}

void Directory::changed(i32 instance, const std::vector<i64> &stored, const std::vector<i64> &evicted) {
    if (!block_tokens_[instance])
        return;
    std::vector<char> &held = held_[instance];
    for (const i64 block : evicted)
        held[block] = 0;
    for (const i64 block : stored) {
        if (block >= static_cast<i64>(held.size()))
            held.resize(2 * block + 1);
        held[block] = 1;
    }
}

i64 Directory::cached_tokens(i32 request, i64 prompt_tokens, i32 instance) const {
    const i64 size = block_tokens_[instance];
    if (!size)
        return 0;
    const Request &asked = requests_[request];
    const i64 *blocks = asked.hashes;
    i64 count = asked.num_hashes;
    if (!others_.empty() && asked.hashes_given) {
        if (const auto other = others_.find(request); other != others_.end()) {
            blocks = other->second.data();
            count = static_cast<i64>(other->second.size());
        }
    }
    // Never the last token, for that one is to be computed.
    const i64 whole = std::min(count, std::max<i64>(prompt_tokens - 1, 0) / size);
    i64 depth = 0;
    while (depth < whole && has(instance, blocks[depth]))
        ++depth;
    return depth * size;
}

bool Directory::has(i32 instance, i64 block) const {
    const std::vector<char> &held = held_[instance];
    return block < static_cast<i64>(held.size()) && held[block];
}

} // namespace sagec
