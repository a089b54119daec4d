// The TurboMind library of this process: its functions, and the slots through which it calls them.
#pragma once

#include <string>
#include <vector>

namespace sagec::tm {

// A function of ours that takes the place of one of TurboMind's (or of one that it imports).
// `original` is set before any slot is patched, and is what the hook calls on to.
struct Hook {
    const char *name;
    void *replacement;
    void **original;
};

// Typed access to an original: `static Original<int(BlockManager *, int)> evict;`
template <class Signature> class Original;
template <class R, class... A> class Original<R(A...)> {
  public:
    R operator()(A... arguments) const {
        return reinterpret_cast<R (*)(A...)>(function_)(static_cast<A>(arguments)...);
    }
    void **slot() { return &function_; }
    explicit operator bool() const { return function_ != nullptr; }

  private:
    void *function_ = nullptr;
};

// A function that the library defines or imports, by mangled name; null where there is none.
// Looked up from the library itself, so that nothing preloaded is found instead.
void *resolve(const char *name);

// Where the library's own call of the function goes now: what its slot holds; null where it has none.
void *called(const char *name);

// Patches the PLT slot of each hook, or none: "" or what is missing. `slot` of the library only.
std::string patch(const std::vector<Hook> &hooks);
void restore();
int num_patched();

// Which of the hooks have no export or no slot: "" where none.
std::string missing(const std::vector<Hook> &hooks);

} // namespace sagec::tm
