/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Marking a range of sectors in the dirty maps of every tracked device that contains it.
 *
 * Each tracked device has a slot: a window of sectors on a whole disk, and in `planes` one inner map
 * with two planes, `submitted` and `completed`. A plane is a radix-64 bitmap of LEVELS levels: a bit
 * of level 0 is one granule, a bit of level n stands for a full word of level n-1. A range sets the
 * partial words at its ends and passes the full words between them up as bits of the next level, so
 * any range, up to the 4 GiB of the longest bio, is exact and costs at most eight words.
 *
 * User space swaps the inner map with one update of `planes`; the kernel waits for running programs
 * before that call returns (maybe_wait_bpf_programs), so a retired map no longer changes. Each
 * program therefore looks its inner map up once for each mark and never keeps it.
 *
 * Included after the generated header (abi.py, layout.py), which defines the structs, the field
 * offsets and enum values of the running kernel, and MAP_* for the maps.
 */

/* The pseudo instruction by which a program names a map: 1 the map itself, 2 its only value. */
#define MAP(fd) ((void *)bpf_pseudo_fd(1, fd))
#define VALUE(fd) ((void *)bpf_pseudo_fd(2, fd))

#define EEXIST 17 /* asm-generic/errno-base.h */

#define INLINE static __attribute__((always_inline)) inline

/*
 * Fields of kernel structs, by offset: `p` is a pointer that the verifier knows the BTF type of.
 * Volatile, so that a value used in a loop is loaded in each turn: what one turn's comparisons taught
 * the verifier about it then ends with that turn, and its states meet instead of multiplying.
 */
#define FIELD(type, p, offset) (*(type volatile *)((char *)(p) + (offset)))

#define OP(flags) ((flags) & REQ_OP_MASK)
/* Operations that change sectors they name, and those that change none; the others are opaque. */
#define CHANGES(op) ((op) < 64 && (CHANGE_OPS >> (op) & 1))
#define HARMLESS(op) ((op) < 64 && (HARMLESS_OPS >> (op) & 1))

struct range {
	u64 sector;
	u64 sectors;
};

INLINE u32 disk_number(void *disk)
{
	return FIELD(u32, disk, GENDISK_MAJOR) << 20 | FIELD(u32, disk, GENDISK_FIRST_MINOR);
}

INLINE struct stats *stats_of(u32 slot)
{
	return bpf_map_lookup_elem(MAP(MAP_STATS), &slot);
}

/* Added atomically: a program may be interrupted by another on the same CPU. */
#define COUNT(slot, field)                                             \
	do {                                                           \
		struct stats *_s = stats_of(slot);                     \
		if (_s)                                                \
			__sync_fetch_and_add(&_s->field, 1);           \
	} while (0)

/* Testing first keeps a hot word's cache line shared between CPUs when its bits are set already. */
INLINE void set_bits(void *map, u32 word, u64 bits)
{
	u64 *p = bpf_map_lookup_elem(map, &word);

	if (p && (*p & bits) != bits)
		__sync_fetch_and_or(p, bits);
}

INLINE void mark_granules(struct window *w, void *map, u32 plane, u64 first, u64 last)
{
	u32 base = plane * w->plane_words;

#pragma unroll
	for (int level = 0; level < LEVELS; level++) {
		u32 words = base + w->level[level];
		u64 low = first >> 6, high = last >> 6;
		u64 head = ~0ULL << (first & 63), tail = ~0ULL >> (63 - (last & 63));

		if (low == high) {
			set_bits(map, words + low, head & tail);
			return;
		}
		if (level == LEVELS - 1) {
			/* 4 GiB in granules of 512 bytes is 32 bits here: two words at most. */
			set_bits(map, words + low, head);
			set_bits(map, words + high, tail);
			return;
		}
		if (first & 63) {
			set_bits(map, words + low, head);
			low++;
		}
		if (~last & 63) {
			set_bits(map, words + high, tail);
			high--;
		}
		if (low > high)
			return;
		first = low;
		last = high;
	}
}

/* Mark what of a range lies in the window of `slot`; `again` if it was counted before. */
INLINE void mark_once(struct windows *ws, u32 slot, u32 plane, struct range r, bool again)
{
	struct window *w = &ws->window[slot];
	u64 first = r.sector, end = r.sector + r.sectors;
	struct stats *s = stats_of(slot);
	void *map;

	/* Plain additions: a program never runs twice at once on a CPU, and only one adds to each.
	 * Copies may disturb each other; their counts are shown, and nothing depends on them. */
	if (s && plane == SUBMITTED && !again)
		s->begun += r.sectors << 9;
	if (s && plane == COMPLETED)
		s->ended += r.sectors << 9;

	if (end > w->end) {
		if (w->whole)
			COUNT(slot, beyond);
		end = w->end;
	}
	if (first < w->start)
		first = w->start;
	if (first >= end)
		return;

	map = bpf_map_lookup_elem(MAP(MAP_PLANES), &slot);
	if (!map)
		return;
	mark_granules(w, map, plane, (first - w->start) >> w->shift, (end - 1 - w->start) >> w->shift);

	if (s && plane == COMPLETED) {
		s->writes++;
		s->written += (end - first) << 9;
	}
}

INLINE void mark(struct windows *ws, u32 slot, u32 plane, struct range r)
{
	mark_once(ws, slot, plane, r, false);
}

/* The slots of one whole disk: one, or more where it or several of its partitions are tracked. */
#define FOR_EACH_SLOT(ws, kind, number, slot)                          \
	for (u32 slot = 0; slot < SLOTS && slot < (ws)->count[kind]; slot++) \
		if ((ws)->dev[kind][slot] == (number))

INLINE void count_opaque(struct windows *ws, u32 kind, u32 number)
{
	FOR_EACH_SLOT(ws, kind, number, slot)
		COUNT(slot, opaque);
}
