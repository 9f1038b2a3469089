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
 * Where programs can be preempted (layout.py), the kernel does not run the first of several copies for
 * some events, and counts them. `caught` is how many of those a later copy was run for; by as many as
 * it is behind, all copies missed one. What an event is about is in `seen` from the first copy that is
 * run to the last one, or, should that be skipped, until it ends. Bios of request-based disks stay then:
 * their ends are traced as those of requests alone (blk_update_request). What is found there by mistake
 * is not caught, which is a doubt; when there is no room for more, each copy does what is to be done.
 *
 * Included after the generated header (abi.py, layout.py), which defines the structs, the field
 * offsets and enum values of the running kernel, and MAP_* for the maps.
 */

/* The pseudo instruction by which a program names a map: 1 the map itself, 2 its only value. */
#define MAP(fd) ((void *)bpf_pseudo_fd(1, fd))
#define VALUE(fd) ((void *)bpf_pseudo_fd(2, fd))

#define EEXIST 17 /* asm-generic/errno-base.h */

#define INLINE static __attribute__((always_inline)) inline

INLINE void count_caught(u32 kind, s64 number)
{
	s64 *caught = bpf_map_lookup_elem(MAP(MAP_CAUGHT), &kind);

	if (caught)
		__sync_fetch_and_add(caught, number);
}

/* What is not remembered as seen is going to be caught for nothing, or else a doubt. */
INLINE void remember_seen(u32 kind, u64 what)
{
	u32 yes = 1;

	if (bpf_map_update_elem(MAP(MAP_SEEN), &what, &yes, BPF_ANY))
		count_caught(kind, -1);
}

INLINE void forget_seen(void *what)
{
	u64 key = (u64)what;

	if (bpf_map_lookup_elem(MAP(MAP_SEEN), &key))
		bpf_map_delete_elem(MAP(MAP_SEEN), &key);
}

enum copy { FIRST, AGAIN, LAST };

/* Whether this copy is the first that is run for an event, and so has to do what is to be done. */
INLINE bool its_turn(enum copy copy, u32 kind, void *what)
{
	u64 key = (u64)what;

	if (copy != FIRST && bpf_map_lookup_elem(MAP(MAP_SEEN), &key)) {
		if (copy == LAST)
			bpf_map_delete_elem(MAP(MAP_SEEN), &key);
		return false;
	}
	if (copy != FIRST)
		count_caught(kind, 1);
	if (PREEMPTIBLE && copy != LAST)
		remember_seen(kind, key);
	return true;
}

/*
 * Fields of kernel structs, by offset: `p` is a pointer that the verifier knows the BTF type of.
 * Volatile, so that a value used in a loop is loaded in each turn: what one turn's comparisons taught
 * the verifier about it then ends with that turn, and its states meet instead of multiplying.
 */
#define FIELD(type, p, offset) (*(type volatile *)((char *)(p) + (offset)))

/* What a probed function got as its second argument, as a pointer to a type. */
#define SECOND(regs, type) (((void *(*)(void *, u32))CAST)(*(void **)((char *)(regs) + REGS_SECOND), type))

#define OP(flags) ((flags) & REQ_OP_MASK)
/* Operations that change sectors they name, and those that change none; the others are opaque. */
#define CHANGES(op) ((op) < 64 && (CHANGE_OPS >> (op) & 1))
#define HARMLESS(op) ((op) < 64 && (HARMLESS_OPS >> (op) & 1))

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

/* Mark what of a change lies in the window of its slot. */
INLINE void mark_window(struct change *c)
{
	struct windows *ws = VALUE(MAP_WINDOWS);
	u64 first = c->sector, end = c->sector + c->sectors;
	u32 slot = c->slot, plane = c->plane;
	struct window *w;
	struct stats *s;
	void *map;

	if (slot >= SLOTS)
		return;
	w = &ws->window[slot];
	s = stats_of(slot);

	/* Plain additions where one program adds: it never runs twice at once on a CPU. Those of bios have
	 * copies that may disturb each other; their counts are shown, and nothing depends on them. */
	if (s && plane == SUBMITTED && PREEMPTIBLE)
		__sync_fetch_and_add(&s->begun, c->sectors << 9);
	else if (s && plane == SUBMITTED)
		s->begun += c->sectors << 9;
	if (s && plane == COMPLETED)
		s->ended += c->sectors << 9;

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

int mark_change(struct change *c);

INLINE void mark(u32 slot, u32 plane, u64 sector, u64 sectors)
{
	struct change c = { slot, plane, sector, sectors };

	mark_change(&c);
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
