// What most kernels need: 16 bytes at a time, the type to compute in, which thread this is.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "host.h"
#endif

// N values that are loaded and stored together, by 16 bytes where they are so many.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
    T values[N];
};

template <typename V>
__device__ inline void copy(const V* from, V* to) {
    if constexpr (sizeof(V) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < sizeof(V) / 16; i++) {
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
    } else {
        *to = *from;
    }
}

template <int N, typename T>
__device__ Vector<T, N> load(const T* address) {
    Vector<T, N> vector;
    copy(reinterpret_cast<const Vector<T, N>*>(address), &vector);
    return vector;
}

template <int N, typename T>
__device__ void store(T* address, const Vector<T, N>& vector) {
    copy(&vector, reinterpret_cast<Vector<T, N>*>(address));
}

// float32, or float64 for float64.
__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(unsigned char value) { return value; }

template <typename T>
struct WideOf {
    using type = float;
};
template <>
struct WideOf<double> {
    using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// The nearest T, ties to even; of an integer type, within its range.
template <typename T>
__device__ T narrow(Wide<T> value) {
    return value;
}
template <>
__device__ inline __half narrow<__half>(float value) {
    return __float2half(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
    return __float2bfloat16(value);
}
template <>
__device__ inline unsigned char narrow<unsigned char>(float value) {
    return (unsigned char)fmin(fmax(rint(value), 0.0f), 255.0f);
}

// The number of this thread in a grid of one dimension.
__device__ inline long long this_thread() {
    return (long long)blockIdx.x * blockDim.x + threadIdx.x;
}

// a / b for a, b >= 0, by the much faster division of 32 bits where it will do.
__device__ inline long long quotient(long long a, long long b) {
    return (a | b) >> 31 ? a / b : unsigned(a) / unsigned(b);
}

// What is divided by often, as divisor() of cuda.py makes it: up to 2^31, a / divisor is
// a multiplier / 2^(32 + shift), rounded down. Without a multiplier, a division must do.
struct Divisor {
    long long divisor;
    unsigned multiplier, shift;
};

__device__ inline unsigned quick_quotient(unsigned a, const Divisor& by) {
    return __umulhi(a, by.multiplier) >> by.shift;
}

__device__ inline long long quotient(long long a, const Divisor& by) {
    return a >> 31 || !by.multiplier ? a / by.divisor : quick_quotient(unsigned(a), by);
}
