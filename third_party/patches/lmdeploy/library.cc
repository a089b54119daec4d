// Where TurboMind's library calls its own functions and those of others: through slots of its global
// offset table, one a function, which the loader filled. To hook a function is to write its slot.
#include "library.h"

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>
#include <unordered_map>

namespace sagec::tm {
namespace {

struct Library {
    std::string path;
    std::uintptr_t base = 0, read_only_begin = 0, read_only_end = 0; // PT_GNU_RELRO
    void *handle = nullptr;
    std::unordered_map<std::string, void **> slots; // by the name of the function
};

struct Patched {
    void **slot;
    void *before;
};

std::mutex patch_mutex;
std::vector<Patched> patched;

bool is_turbomind(const char *path) {
    const char *name = path ? std::strrchr(path, '/') : nullptr;
    return name && std::strncmp(name, "/_turbomind.", 12) == 0;
}

// The loader has relocated the addresses of the dynamic section of a loaded library.
void collect_slots(Library &library, const ElfW(Dyn) * dynamic) {
    const ElfW(Rela) *relocations = nullptr;
    const ElfW(Sym) *symbols = nullptr;
    const char *strings = nullptr;
    std::size_t num_bytes = 0;
    for (; dynamic->d_tag != DT_NULL; ++dynamic) {
        const auto address = dynamic->d_un.d_ptr;
        switch (dynamic->d_tag) {
        case DT_JMPREL:
            relocations = reinterpret_cast<const ElfW(Rela) *>(address);
            break;
        case DT_PLTRELSZ:
            num_bytes = dynamic->d_un.d_val;
            break;
        case DT_SYMTAB:
            symbols = reinterpret_cast<const ElfW(Sym) *>(address);
            break;
        case DT_STRTAB:
            strings = reinterpret_cast<const char *>(address);
            break;
        }
    }
    if (!relocations || !symbols || !strings)
        return;
    for (std::size_t i = 0; i < num_bytes / sizeof(*relocations); ++i) {
        const auto &relocation = relocations[i];
        if (ELF64_R_TYPE(relocation.r_info) == R_X86_64_JUMP_SLOT)
            library.slots[strings + symbols[ELF64_R_SYM(relocation.r_info)].st_name] =
                reinterpret_cast<void **>(library.base + relocation.r_offset);
    }
}

int look_at(dl_phdr_info *object, std::size_t, void *found) {
    if (!is_turbomind(object->dlpi_name))
        return 0;
    auto &library = *static_cast<Library *>(found);
    library.path = object->dlpi_name;
    library.base = object->dlpi_addr;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto &header = object->dlpi_phdr[i];
        const auto address = object->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_DYNAMIC)
            collect_slots(library, reinterpret_cast<const ElfW(Dyn) *>(address));
        if (header.p_type == PT_GNU_RELRO) {
            library.read_only_begin = address;
            library.read_only_end = address + header.p_memsz;
        }
    }
    return 1;
}

// Found at the first call that finds it; it is never unloaded.
const Library &library() {
    static std::mutex mutex;
    static Library found;
    std::lock_guard lock(mutex);
    if (!found.handle && dl_iterate_phdr(look_at, &found))
        found.handle = dlopen(found.path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    return found;
}

// A library linked with -z now has its slots among what is read-only after loading.
bool write_slot(void **slot, void *function) {
    const auto address = reinterpret_cast<std::uintptr_t>(slot);
    const auto &in = library();
    const bool read_only = in.read_only_begin <= address && address < in.read_only_end;
    const auto page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    auto *page = reinterpret_cast<void *>(address & ~(page_bytes - 1));
    if (read_only && mprotect(page, page_bytes, PROT_READ | PROT_WRITE) != 0)
        return false;
    __atomic_store_n(slot, function, __ATOMIC_RELEASE);
    if (read_only)
        mprotect(page, page_bytes, PROT_READ);
    return true;
}

void restore_from(std::size_t first) {
    for (; patched.size() > first; patched.pop_back())
        write_slot(patched.back().slot, patched.back().before);
}

} // namespace

// Looked up by handle: its own scope, then what it was linked with. The value that a slot had is no
// original: under lazy binding it is the loader's resolver, which would overwrite the patch.
void *resolve(const char *name) {
    const auto &in = library();
    return in.handle ? dlsym(in.handle, name) : nullptr;
}

void *called(const char *name) {
    const auto &in = library();
    const auto slot = in.slots.find(name);
    return slot == in.slots.end() ? nullptr : *slot->second;
}

std::string missing(const std::vector<Hook> &hooks) {
    const auto &in = library();
    if (!in.handle)
        return "TurboMind is not loaded; import lmdeploy's _turbomind first";
    std::string names;
    for (const auto &hook : hooks)
        if (!in.slots.count(hook.name) || !resolve(hook.name))
            names += std::string(names.empty() ? "" : ", ") + hook.name;
    if (names.empty())
        return "";
    return in.path + " does not define, or does not call through its PLT: " + names;
}

std::string patch(const std::vector<Hook> &hooks) {
    if (auto why = missing(hooks); !why.empty())
        return why;
    for (const auto &hook : hooks)
        *hook.original = resolve(hook.name);
    std::lock_guard lock(patch_mutex);
    const auto first = patched.size();
    for (const auto &hook : hooks) {
        void **slot = library().slots.at(hook.name);
        void *before = *slot;
        if (!write_slot(slot, hook.replacement)) {
            restore_from(first);
            return std::string("cannot write the slot of ") + hook.name + ": " + std::strerror(errno);
        }
        patched.push_back({slot, before});
    }
    return "";
}

void restore() {
    std::lock_guard lock(patch_mutex);
    restore_from(0);
}

int num_patched() {
    std::lock_guard lock(patch_mutex);
    return static_cast<int>(patched.size());
}

} // namespace sagec::tm
