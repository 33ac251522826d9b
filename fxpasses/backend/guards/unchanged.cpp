// Whether dictionaries and types are as they were recorded, from the top of a tree of modules down.
//
// A dictionary's version tag changes with whatever is put in or taken out (CPython 3.10 to 3.12). Nothing of an
// entry is read before those above it were found unchanged: what an unchanged dictionary holds is alive. The
// caller holds the GIL. What is used of Python is declared here, so that its headers are not needed.
#include <cstdint>

extern "C" {

struct Object {
    intptr_t references;
    void* type;
};

Object* PyObject_GenericGetDict(Object*, void*);
Object* PyTuple_New(intptr_t);
int PyTuple_SetItem(Object*, intptr_t, Object*);
Object* PyObject_CallObject(Object*, Object*);
int PyObject_IsTrue(Object*);
void Py_IncRef(Object*);
void Py_DecRef(Object*);

// A dictionary; where there is a module, it is that module's `__dict__`.
struct Entry {
    Object* module;
    void* type;
    const Object* dictionary;
    uint64_t tag;
};

static uint64_t tag_of(const Object* dictionary) {
    return reinterpret_cast<const uint64_t*>(dictionary)[3];
}

static bool is_unchanged(const Entry& entry) {
    const Object* dictionary = entry.dictionary;
    if (entry.module) {
        if (entry.module->type != entry.type) return false;
        Object* found = PyObject_GenericGetDict(entry.module, nullptr);
        if (found) Py_DecRef(found);  // which the module holds too
        if (found != dictionary) return false;
    }
    return tag_of(dictionary) == entry.tag;
}

// 1 or 0; -1 with a Python error. `lines`: addresses of what is read here and by the code that is guarded; between
// calls a network takes the caches, so all is asked for at once. Nothing happens where one is no longer in use.
int fxpasses_unchanged(const Entry* entries, int64_t count, Object** tensors, int64_t tensor_count,
                       const void* const* lines, int64_t line_count, Object* check) {
    for (int64_t i = 0; i < line_count; ++i) __builtin_prefetch(lines[i], 0, 2);
    for (int64_t i = 0; i < count; ++i)
        if (!is_unchanged(entries[i])) return 0;
    if (!tensor_count) return 1;
    Object* arguments = PyTuple_New(tensor_count);
    if (!arguments) return -1;
    for (int64_t i = 0; i < tensor_count; ++i) {
        Py_IncRef(tensors[i]);
        PyTuple_SetItem(arguments, i, tensors[i]);
    }
    Object* told = PyObject_CallObject(check, arguments);
    Py_DecRef(arguments);
    if (!told) return -1;
    const int result = PyObject_IsTrue(told);
    Py_DecRef(told);
    return result;
}
}
