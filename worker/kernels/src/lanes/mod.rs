//! Sixteen f32 lanes: the one vector type the kernels are written in.
//!
//! Every kernel body is generic over [`Lanes`], is inlined into one function per instruction set by
//! [`kernel!`], and so has one source. All implementations round every operation as IEEE demands and reduce
//! in the same order, which is why the paths give equal bits.
//!
//! What it is not: a general vector library. It has the operations the kernels need.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use portable::Portable;

/// Lanes of a vector on every path.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values.
///
/// # Safety
/// All methods may be called only where the implementation's instruction set is available (inside a function
/// made by [`kernel!`]). Loads and stores touch 16 elements (the `_partial` ones `count` ≤ 16) at the pointer,
/// which need not be aligned.
pub(crate) trait Lanes: Copy + Sum {
    /// Tokens whose sums with four rows the registers hold, in [`Lanes::add_products`].
    const TOKENS: usize;

    /// Sums of sixteen lanes that the registers hold beside their operands.
    const SUMS: usize;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    /// The first `count` lanes; the rest are zero.
    unsafe fn load_partial(from: *const f32, count: usize) -> Self;
    unsafe fn load_f16(from: *const u16) -> Self;
    unsafe fn load_bf16(from: *const u16) -> Self;
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Of 8-bit floats ([`crate::DType::F8E4M3`]).
    unsafe fn load_f8e4m3(from: *const u8) -> Self;
    /// From sixteen exact integers.
    unsafe fn from_i32(from: *const i32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn store_partial(self, to: *mut f32, count: usize);
    /// Rounded to nearest even.
    unsafe fn store_f16(self, to: *mut u16);
    /// Of integral values within −127..=127.
    unsafe fn store_i8(self, to: *mut i8);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// self · factor + addend, rounded once.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// self where it is the greater, else other (other too where either is NaN).
    unsafe fn max(self, other: Self) -> Self;
    /// self where it is the smaller, else other (other too where either is NaN).
    unsafe fn min(self, other: Self) -> Self;
    unsafe fn abs(self) -> Self;
    unsafe fn round_ties_even(self) -> Self;
    /// Zero in the lanes where `key` is below `limit`.
    unsafe fn zero_where_below(self, key: Self, limit: f32) -> Self;
    /// self · 2ⁿ, where n is an integer that `biased` holds in its low mantissa bits (1.5·2²³ + n).
    unsafe fn scale_by_power(self, biased: Self) -> Self;
    /// Lanes `start..end` of self, `other` elsewhere.
    unsafe fn keep(self, start: usize, end: usize, other: f32) -> Self;
    /// To R sums at each of T pointers: the products of `columns` (a multiple of 16) values of a row and of an input, one
    /// FMA after the other in each lane.
    #[inline(always)]
    unsafe fn add_products<const R: usize, const T: usize>(
        sums: [*mut Self; T],
        rows: [*const f32; R],
        inputs: [*const f32; T],
        columns: usize,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            let mut tile = [[Self::splat(0.0); R]; T];
            for t in 0..T {
                tile[t] = sums[t].cast::<[Self; R]>().read();
            }
            for column in (0..columns).step_by(LANES) {
                let mut x = [Self::splat(0.0); T];
                for t in 0..T {
                    x[t] = Self::load(inputs[t].add(column));
                }
                for r in 0..R {
                    let row = Self::load(rows[r].add(column));
                    for t in 0..T {
                        tile[t][r] = row.mul_add(x[t], tile[t][r]);
                    }
                }
            }
            for t in 0..T {
                sums[t].cast::<[Self; R]>().write(tile[t]);
            }
        }
    }
    /// Halving tree: i + (i + 8), then + 4, + 2, + 1.
    unsafe fn sum(self) -> f32;
    /// Greatest lane, by the same tree.
    unsafe fn greatest(self) -> f32;

    /// The first `count` lanes; the rest are zero.
    #[inline(always)]
    unsafe fn load_f16_partial(from: *const u16, count: usize) -> Self {
        // SAFETY: `count` ≤ 16 elements are readable, by contract.
        unsafe { Self::load_f16(padded(from, count).as_ptr()) }
    }

    /// The first `count` lanes; the rest are zero.
    #[inline(always)]
    unsafe fn load_bf16_partial(from: *const u16, count: usize) -> Self {
        // SAFETY: `count` ≤ 16 elements are readable, by contract.
        unsafe { Self::load_bf16(padded(from, count).as_ptr()) }
    }

    /// The first `count` lanes; the rest are zero.
    #[inline(always)]
    unsafe fn load_i8_partial(from: *const i8, count: usize) -> Self {
        // SAFETY: `count` ≤ 16 elements are readable, by contract.
        unsafe { Self::load_i8(padded(from, count).as_ptr()) }
    }
}

/// `count` elements from a pointer that need not be aligned, followed by zeros.
///
/// # Safety
/// `count` ≤ 16 elements are readable.
#[inline(always)]
pub(crate) unsafe fn padded<T: Copy + Default>(from: *const T, count: usize) -> [T; LANES] {
    let mut values = [T::default(); LANES];
    // SAFETY: the caller's contract. As bytes, which have no alignment.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), values.as_mut_ptr().cast::<u8>(), count * size_of::<T>()) };
    values
}

/// Writes the first `count` of `values` to a pointer that need not be aligned.
///
/// # Safety
/// `count` ≤ 16 elements are writable.
#[inline(always)]
unsafe fn write_first(values: [f32; LANES], to: *mut f32, count: usize) {
    // SAFETY: the caller's contract. As bytes, which have no alignment.
    unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), to.cast::<u8>(), count * size_of::<f32>()) };
}

/// What the reduction tree adds.
pub(crate) trait Sum: Copy {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn plus(self, other: Self) -> Self;
}

impl Sum for f32 {
    #[inline(always)]
    unsafe fn plus(self, other: f32) -> f32 {
        self + other
    }
}

/// The values that wait for their neighbours while the leaves of N sums are added in the tree's order
/// ([`crate::tree::merges_after`]). Eight leaves never leave more than four waiting.
pub(crate) struct LeafStack<T, const N: usize> {
    waiting: [[T; N]; 4],
    depth: usize,
}

impl<T: Sum, const N: usize> LeafStack<T, N> {
    #[inline(always)]
    pub(crate) const fn new(zero: T) -> Self {
        LeafStack { waiting: [[zero; N]; 4], depth: 0 }
    }

    /// Pushes a leaf, then merges the two topmost entries `merges` times.
    ///
    /// # Safety
    /// As [`Lanes`].
    #[inline(always)]
    pub(crate) unsafe fn push(&mut self, leaf: [T; N], merges: u8) {
        let mut top = leaf;
        for _ in 0..merges {
            self.depth -= 1;
            for (top, lower) in top.iter_mut().zip(self.waiting[self.depth]) {
                // SAFETY: the caller's contract.
                *top = unsafe { lower.plus(*top) };
            }
        }
        self.waiting[self.depth] = top;
        self.depth += 1;
    }

    /// The sum, after all leaves.
    #[inline(always)]
    pub(crate) fn total(self) -> [T; N] {
        self.waiting[0]
    }

    /// The sum, after all leaves; the next leaf begins another.
    #[inline(always)]
    pub(crate) fn take_total(&mut self) -> [T; N] {
        self.depth = 0;
        self.waiting[0]
    }
}

/// An element type in memory that widens exactly to f32: what a dense weight or a KV pool is made of.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// All bits zero.
    const ZERO: Self;
    /// Whether a KV pool has a scale beside the elements of a token and head.
    const SCALED: bool = false;
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// # Safety
    /// As [`Lanes::load_partial`].
    unsafe fn load_partial<L: Lanes>(from: *const Self, count: usize) -> L;
}

/// An [`Element`] that any f32 can be rounded to.
pub(crate) trait Rounded: Element {
    /// Rounded to nearest even.
    ///
    /// # Safety
    /// As [`Lanes::store`].
    unsafe fn store<L: Lanes>(value: L, to: *mut Self);
}

impl Element for i8 {
    const ZERO: i8 = 0;
    const SCALED: bool = true;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const i8) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_i8(from) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(from: *const i8, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_i8_partial(from, count) }
    }
}

impl Rounded for f32 {
    #[inline(always)]
    unsafe fn store<L: Lanes>(value: L, to: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe { value.store(to) }
    }
}

impl Element for f32 {
    const ZERO: f32 = 0.0;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load(from) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(from: *const f32, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_partial(from, count) }
    }
}

impl Rounded for half::f16 {
    #[inline(always)]
    unsafe fn store<L: Lanes>(value: L, to: *mut half::f16) {
        // SAFETY: the caller's contract.
        unsafe { value.store_f16(to.cast()) }
    }
}

impl Element for half::f16 {
    const ZERO: half::f16 = half::f16::ZERO;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const half::f16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(from: *const half::f16, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_f16_partial(from.cast(), count) }
    }
}

impl Rounded for half::bf16 {
    #[inline(always)]
    unsafe fn store<L: Lanes>(value: L, to: *mut half::bf16) {
        let mut wide = [0.0_f32; LANES];
        // SAFETY: `wide` holds 16 values; the rest is the caller's contract.
        unsafe {
            value.store(wide.as_mut_ptr());
            to.cast::<[half::bf16; LANES]>().write_unaligned(wide.map(half::bf16::from_f32));
        }
    }
}

impl Element for half::bf16 {
    const ZERO: half::bf16 = half::bf16::ZERO;

    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const half::bf16) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_bf16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(from: *const half::bf16, count: usize) -> L {
        // SAFETY: the caller's contract.
        unsafe { L::load_bf16_partial(from.cast(), count) }
    }
}

/// Makes `fn name(path, arguments)` out of a generic `unsafe fn body<L: Lanes, …>(arguments)`: one instance per
/// instruction set, picked by `path`.
///
/// The caller vouches, in a safety comment, for what the body asks of its arguments; the macro vouches for the
/// instruction set, since a [`crate::path::CpuPath`] in use is a supported one.
macro_rules! kernel {
    ($(#[$meta:meta])* $visibility:vis unsafe fn $name:ident $(<$($generic:ident : $bound:path),+>)? ($($argument:ident : $type:ty),* $(,)?) $(-> $result:ty)? = $body:ident) => {
        $(#[$meta])*
        $visibility unsafe fn $name $(<$($generic: $bound),+>)? (path: $crate::path::CpuPath, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            unsafe fn avx512 $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
                // SAFETY: the instruction set is enabled here; the rest is the caller's contract.
                unsafe { $body::<$crate::lanes::Avx512 $($(, $generic)+)?>($($argument),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
                // SAFETY: as above.
                unsafe { $body::<$crate::lanes::Avx2 $($(, $generic)+)?>($($argument),*) }
            }
            // SAFETY: a path in use is supported by this machine (`CpuPath::choose`).
            unsafe {
                match path {
                    #[cfg(target_arch = "x86_64")]
                    $crate::path::CpuPath::Avx512 => avx512 $(::<$($generic),+>)? ($($argument),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::path::CpuPath::Avx2 => avx2 $(::<$($generic),+>)? ($($argument),*),
                    _ => $body::<$crate::lanes::Portable $($(, $generic)+)?>($($argument),*),
                }
            }
        }
    };
}
pub(crate) use kernel;

#[cfg(test)]
mod tests;
