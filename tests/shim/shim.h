// A CUDA block on one CPU thread: every CUDA thread is a fibre, the scheduler below switches between them
// only where a kernel waits (barriers, shuffles), so results are deterministic. Put before a kernel's source.
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__ inline
#define __forceinline__
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

using std::max;
using std::min;

struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct float4 { float x, y, z, w; };

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
enum State { READY, AT_WARP, AT_BLOCK, DONE };
constexpr int WARP = 32, STACK = 1 << 16;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibres;
static std::vector<State> states;
static std::vector<char> stacks;
static std::vector<uint64_t> slots;  // what a thread offers to its warp
static int current;
static void (*body)(void*);
static void* body_argument;

inline void wait(State state) { states[current] = state; swapcontext(&fibres[current], &scheduler); }
static void enter() { body(body_argument); states[current] = DONE; swapcontext(&fibres[current], &scheduler); }

static bool release_warps(int count) {  // a warp goes on when all its living threads wait for it
    bool released = false;
    for (int first = 0; first < count; first += WARP) {
        int last = std::min(first + WARP, count), waiting = 0, living = 0;
        for (int t = first; t < last; ++t) { living += states[t] != DONE; waiting += states[t] == AT_WARP; }
        if (waiting == 0 || waiting != living) continue;
        for (int t = first; t < last; ++t) if (states[t] == AT_WARP) states[t] = READY;
        released = true;
    }
    return released;
}

static int run_block(int count) {
    for (int t = 0; t < count; ++t) {
        getcontext(&fibres[t]);
        fibres[t].uc_stack.ss_sp = &stacks[size_t(t) * STACK];
        fibres[t].uc_stack.ss_size = STACK;
        fibres[t].uc_link = &scheduler;
        makecontext(&fibres[t], enter, 0);
        states[t] = READY;
    }
    for (;;) {
        for (int t = 0; t < count; ++t) {
            if (states[t] != READY) continue;
            current = t;
            threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
            swapcontext(&scheduler, &fibres[t]);
        }
        if (release_warps(count)) continue;
        if (std::all_of(states.begin(), states.end(), [](State s) { return s == DONE; })) return 0;
        if (!std::all_of(states.begin(), states.end(), [](State s) { return s == AT_BLOCK; })) return 1;
        std::fill(states.begin(), states.end(), READY);
    }
}

template <class... A, size_t... I>
int launch_with(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, std::index_sequence<I...>) {
    auto bound = [&] { kernel(*reinterpret_cast<std::remove_reference_t<A>*>(arguments[I])...); };
    body = [](void* f) { (*static_cast<decltype(bound)*>(f))(); };
    body_argument = &bound;
    gridDim = grid, blockDim = block;
    int count = block.x * block.y * block.z;
    fibres.resize(count), states.assign(count, READY), slots.assign(count, 0), stacks.resize(size_t(count) * STACK);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                if (run_block(count)) return 1;  // some threads wait where others never come
            }
    return 0;
}

template <class... A>
int launch(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments) {
    return launch_with(kernel, grid, block, arguments, std::index_sequence_for<A...>());
}

template <class T>
T exchange(T value, int source) {  // read what another lane of the warp offers
    int base = current / WARP * WARP;
    std::memcpy(&slots[current], &value, sizeof(T));
    wait(AT_WARP);
    int from = base + source;
    T result = value;
    if (source >= 0 && source < WARP && from < int(slots.size())) std::memcpy(&result, &slots[from], sizeof(T));
    wait(AT_WARP);
    return result;
}
}  // namespace shim

inline void __syncthreads() { shim::wait(shim::AT_BLOCK); }
inline void __syncwarp(unsigned = ~0u) { shim::wait(shim::AT_WARP); }
template <class T> T __shfl_down_sync(unsigned, T value, int by) { return shim::exchange(value, shim::current % 32 + by); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return shim::exchange(value, (shim::current % 32) ^ mask); }
template <class T> T __shfl_sync(unsigned, T value, int lane) { return shim::exchange(value, lane); }
template <class T> T atomicAdd(T* place, T value) { T old = *place; *place += value; return old; }
inline int __float_as_int(float v) { int i; std::memcpy(&i, &v, 4); return i; }
inline float __int_as_float(int v) { float f; std::memcpy(&f, &v, 4); return f; }
