// How the C ABI refuses: one line, kept for the thread until its next.
#pragma once

#include <string>
#include <utility>

namespace sagec::tm {

// Null where there is nothing to say.
inline const char *refusal(std::string line) {
    thread_local std::string kept;
    kept = std::move(line);
    return kept.empty() ? nullptr : kept.c_str();
}

} // namespace sagec::tm
