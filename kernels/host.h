// CUDA C++ on a CPU: what a kernel's source needs from the language, and one fiber a thread.
//
// A block's threads run one after the other, each until it waits (__syncthreads, a warp's shuffle
// or vote) or ends; when all that a thread waits for have come, it goes on. In another order of the
// threads a missing barrier shows as another result. Blocks run one after the other, too.
// One kernel at a time: the state below is the process's. gpunn/kernels/host.py compiles and calls.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <type_traits>
#include <utility>

#define __global__ static  // what is its own, its shared memory too, the address sanitizer guards
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#undef assert
#define assert(condition) ((condition) ? void() : host::fail("assertion failed: " #condition))

struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

namespace host {

enum class Waits { for_nothing, for_warp, for_block, ended };

struct Fiber {
    ucontext_t context;
    Waits waits;
    unsigned mask;  // of the lanes that a warp's operation is for
    uint64_t slot;  // what the other lanes of the warp may read
};

const int MOST_THREADS = 1024;
const size_t STACK = 128 * 1024;
static Fiber fibers[MOST_THREADS];
static char* stacks;
static ucontext_t scheduler;
static int current, n_threads;
static const char* error;
static void (*run_thread)(void**);
static void** kernel_arguments;

inline void yield(Waits waits, unsigned mask = 0) {
    fibers[current].waits = waits;
    fibers[current].mask = mask;
    swapcontext(&fibers[current].context, &scheduler);
}

// Ends the launch; the other threads are left where they are.
inline void fail(const char* message) {
    error = message;
    yield(Waits::ended);
}

inline void thread_main() {
    for (;;) {
        run_thread(kernel_arguments);
        yield(Waits::ended);
    }
}

inline void make_fibers() {
    if (!stacks) stacks = static_cast<char*>(malloc(STACK * MOST_THREADS));
    for (int i = 0; i < n_threads; i++) {
        ucontext_t& context = fibers[i].context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + i * STACK;
        context.uc_stack.ss_size = STACK;
        context.uc_link = nullptr;
        makecontext(&context, thread_main, 0);
    }
}

// Whether all lanes that a thread names in its mask wait as it does; those that ended do not count.
inline bool warp_is_there(int thread) {
    int first = thread & ~31;
    for (int lane = 0; lane < 32 && first + lane < n_threads; lane++) {
        const Fiber& other = fibers[first + lane];
        bool named = fibers[thread].mask >> lane & 1;
        if (named && other.waits != Waits::for_warp && other.waits != Waits::ended) return false;
    }
    return true;
}

// Lets those go on whose company is there; false where nobody can.
inline bool release() {
    bool released = false, block_is_there = true;
    static bool ready[MOST_THREADS];
    for (int i = 0; i < n_threads; i++) {
        ready[i] = fibers[i].waits == Waits::for_warp && warp_is_there(i);
        block_is_there &= fibers[i].waits == Waits::for_block || fibers[i].waits == Waits::ended;
    }
    for (int i = 0; i < n_threads; i++) {
        if (ready[i] || (block_is_there && fibers[i].waits == Waits::for_block)) {
            fibers[i].waits = Waits::for_nothing;
            released = true;
        }
    }
    return released;
}

// 0: as numbered, 1: reversed, 2: shuffled.
inline void arrange(int* order, int n, int kind, uint64_t& state) {
    for (int i = 0; i < n; i++) order[i] = kind == 1 ? n - 1 - i : i;
    for (int i = n - 1; kind == 2 && i > 0; i--) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[i], order[(state >> 33) % (i + 1)]);
    }
}

inline void run_block(const int* order) {
    for (int i = 0; i < n_threads; i++) fibers[i].waits = Waits::for_nothing;
    int n_left = n_threads;
    while (n_left && !error) {
        for (int k = 0; k < n_threads && !error; k++) {
            current = order[k];
            if (fibers[current].waits != Waits::for_nothing) continue;
            unsigned x = current % blockDim.x, rest = current / blockDim.x;
            threadIdx = {x, rest % blockDim.y, rest / blockDim.y};
            swapcontext(&scheduler, &fibers[current].context);
            n_left -= fibers[current].waits == Waits::ended;
        }
        if (n_left && !error && !release()) error = "deadlock: threads wait at different barriers";
    }
}

template <typename... P, size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    static_assert(
        ((std::is_pointer_v<P> || std::is_class_v<P> || std::is_same_v<P, long long> ||
          std::is_same_v<P, double>)&&...),
        "a kernel's parameters are pointers, structs, long long or double");
    kernel(*static_cast<P*>(arguments[I])...);
}

template <auto KERNEL, typename... P>
void call_with(void (*)(P...), void** arguments) {
    call(KERNEL, arguments, std::index_sequence_for<P...>());
}

// Runs a grid; null, or what went wrong.
template <auto KERNEL>
const char* launch(void** arguments, const long long* grid, const long long* block, int kind,
                   uint64_t seed) {
    gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
    blockDim = {unsigned(block[0]), unsigned(block[1]), unsigned(block[2])};
    n_threads = int(block[0] * block[1] * block[2]);
    if (n_threads > MOST_THREADS) return "a block has at most 1024 threads";
    run_thread = [](void** given) { call_with<KERNEL>(KERNEL, given); };
    kernel_arguments = arguments;
    error = nullptr;
    make_fibers();
    int n_blocks = int(grid[0] * grid[1] * grid[2]);
    int* blocks = static_cast<int*>(malloc(n_blocks * sizeof(int)));
    int threads[MOST_THREADS];
    arrange(blocks, n_blocks, kind, seed);
    for (int i = 0; i < n_blocks && !error; i++) {
        unsigned number = blocks[i], rest = number / gridDim.x;
        blockIdx = {number % gridDim.x, rest % gridDim.y, rest / gridDim.y};
        arrange(threads, n_threads, kind, seed);
        run_block(threads);
    }
    free(blocks);
    return error;
}

inline unsigned lane() { return current & 31; }

// The value that lane ``source`` of this warp gives; every lane of the mask must call.
template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffled value has at most 64 bits");
    memcpy(&fibers[current].slot, &value, sizeof(T));
    yield(Waits::for_warp, mask);
    T result;
    memcpy(&result, &fibers[(current & ~31) + source].slot, sizeof(T));
    yield(Waits::for_warp, mask);  // nobody gives a new value before all have read
    return result;
}

// The lanes of this thread's segment of the warp: first to end - 1.
struct Segment {
    int first, end;
};
inline Segment segment(int width) {
    int first = int(lane()) / width * width;
    return {first, first + width};
}

}  // namespace host

inline void __syncthreads() { host::yield(host::Waits::for_block); }
inline void __syncwarp(unsigned mask = ~0u) { host::yield(host::Waits::for_warp, mask); }

// Where the source is out of reach, a thread gets its own value back.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return host::exchange(mask, value, host::segment(width).first + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = int(host::lane()), source = lane - int(delta);
    return host::exchange(mask, value, source >= host::segment(width).first ? source : lane);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    int lane = int(host::lane()), source = lane + int(delta);
    return host::exchange(mask, value, source < host::segment(width).end ? source : lane);
}
// Earlier segments are within reach, later ones are not.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    int lane = int(host::lane()), source = lane ^ (lanes & 31);
    return host::exchange(mask, value, source < host::segment(width).end ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    using namespace host;
    fibers[current].slot = predicate != 0;
    yield(Waits::for_warp, mask);
    unsigned votes = 0;
    for (int lane = 0, first = current & ~31; lane < 32 && first + lane < n_threads; lane++) {
        bool counts = (mask >> lane & 1) && fibers[first + lane].waits != Waits::ended;
        votes |= unsigned(counts && fibers[first + lane].slot) << lane;
    }
    yield(Waits::for_warp, mask);
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <typename T>
T atomicExch(T* address, T value) {
    return std::exchange(*address, value);
}
template <typename T>
T atomicAdd(T* address, T value) {
    return std::exchange(*address, T(*address + value));
}
template <typename T>
T atomicOr(T* address, T value) {
    return std::exchange(*address, *address | value);
}
template <typename T>
T atomicMax(T* address, T value) {
    return std::exchange(*address, *address < value ? value : *address);
}
template <typename T>
T atomicMin(T* address, T value) {
    return std::exchange(*address, value < *address ? value : *address);
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
    return std::exchange(*address, *address == expected ? value : *address);
}

template <typename T>
void __stwb(T* address, T value) {
    *address = value;
}

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}
// Of half turns: exact at their quarters, as CUDA's.
inline void sincospi(double x, double* sine, double* cosine) {
    double turn = remainder(x, 2), quarter = rint(2 * turn), rest = M_PI * (turn - quarter / 2);
    double s = sin(rest), c = cos(rest);
    int quarters = int(quarter) & 3;
    *sine = quarters & 1 ? c : s;
    *cosine = quarters & 1 ? -s : c;
    if (quarters & 2) *sine = -*sine, *cosine = -*cosine;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// The 16-bit types as bit patterns; conversions round to nearest, ties to even.
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float(unsigned(value.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float value) {
    unsigned bits = __float_as_uint(value);
    if (value != value) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
    unsigned sign = unsigned(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Moved into float32's place the exponent is 112 too small, for subnormal numbers too.
    return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}
inline __half __float2half(float value) {
    uint16_t sign = __float_as_uint(value) >> 16 & 0x8000;
    if (value != value) return {0x7fff};
    float magnitude = fabsf(value);
    if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) return {uint16_t(sign | int(rintf(magnitude * 0x1p24f)))};
    unsigned bits = __float_as_uint(magnitude) - (112u << 23);
    return {uint16_t(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}
