// How the C ABI refuses: one line, kept for the thread until its next.
#pragma once

#include <exception>
#include <string>
#include <utility>

#include "instance.h"

namespace sagec::tm {

// Null where there is nothing to say.
inline const char *refusal(std::string line) {
    thread_local std::string kept;
    kept = std::move(line);
    return kept.empty() ? nullptr : kept.c_str();
}

// What `act` says, "" or why not. Nothing is thrown across the C ABI; there is little that could be but
// want of memory.
template <class Act> const char *refusal_of(Act act) {
    try {
        return refusal(act());
    } catch (const std::exception &error) {
        return refusal(error.what());
    }
}

// What `act` says of an instance; refused where that is not open.
template <class Act> const char *refusal_of(std::uint32_t number, Act act) {
    return refusal_of([&] {
        const auto instance = instance_numbered(number);
        return instance ? act(*instance) : "instance " + std::to_string(number) + " is not open";
    });
}

} // namespace sagec::tm
