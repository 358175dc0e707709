// Random bits: Philox 4x32-10, as in philox.py.
#pragma once
#include "vector.h"

// The four words of elements 4 quad to 4 quad + 3.
__device__ inline uint4 philox(unsigned long long seed, unsigned long long quad) {
    unsigned c0 = unsigned(quad), c1 = unsigned(quad >> 32), c2 = 0, c3 = 0;
    unsigned k0 = unsigned(seed), k1 = unsigned(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        // Halves, not a product of 64 bits: that costs an addition of zero for each high half.
        unsigned high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        unsigned high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// Word i of four, by selection: an array that is indexed so would not stand in registers.
__device__ inline unsigned word(uint4 words, unsigned i) {
    return i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w);
}
